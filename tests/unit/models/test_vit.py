"""The image encoder against upstream's modules, and what is ours alone: smaller grids, checkpoints, other modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_sam import toy_sam

from medsam_lora.config import MethodConfig
from medsam_lora.errors import ConfigError
from medsam_lora.models.sam import SamModel, build
from medsam_lora.models.vit import GridEncoder, joined, partition, run_block
from medsam_lora.peft import attach
from medsam_lora.sam_modules import ImageEncoderViT

WAYS = ("chunked", "augmented", "biased")


def encoder(size: int = 80, seed: int = 0) -> ImageEncoderViT:
    """Upstream's encoder with windows of 3 that do not tile the grid, and no tensor at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = ImageEncoderViT(
            img_size=size,
            embed_dim=32,
            depth=3,
            num_heads=2,
            out_chans=8,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        )
        with torch.no_grad():
            for parameter in vit.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return vit


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def output_and_gradients(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    out = module(pixels)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    module.zero_grad()
    (out * weight).sum().backward()
    return {"output": out.detach()} | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    # Of the largest gradient in all, as a key's bias has none but rounding.
    assert found.keys() == exact.keys()
    scale = max(float(t.abs().max()) for name, t in exact.items() if name != "output")
    errors = [float((found[n].double() - exact[n]).abs().max()) / scale for n in exact if n != "output"]
    return max(*errors, float((found["output"].double() - exact["output"]).abs().max() / exact["output"].abs().max()))


@pytest.mark.parametrize("size", [80, 96, 112])  # grids of 5, 6, 7 with windows of 3
@pytest.mark.parametrize("way", WAYS)
def test_float64_is_the_official_function(way: str, size: int) -> None:
    official = encoder(size).double()
    expected = output_and_gradients(official, noise(2, 3, size, size).double())
    ours = GridEncoder(copy.deepcopy(official), way)
    assert list(ours.state_dict()) == list(official.state_dict())
    found = output_and_gradients(ours, noise(2, 3, size, size).double())
    assert len(expected) == len(list(official.parameters())) + 1
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_float32_is_official_within_its_rounding(way: str) -> None:
    exact = output_and_gradients(encoder().double(), noise(2, 3, 80, 80).double())
    plain = worst(output_and_gradients(encoder(), noise(2, 3, 80, 80)), exact)
    ours = worst(output_and_gradients(GridEncoder(encoder(), way), noise(2, 3, 80, 80)), exact)
    assert 0 < plain < 1e-4
    assert ours < 1e-4
    assert ours <= 2 * plain


def test_bfloat16_autocast_is_no_less_accurate_than_official() -> None:
    """The mean over several pictures: of a single one either may be a tenth ahead, on one processor and not another."""
    official, ours = [], []
    for seed in range(6):
        pixels = torch.randn(4, 3, 80, 80, generator=torch.Generator().manual_seed(100 + seed))
        exact = output_and_gradients(encoder().double(), pixels.double())
        with torch.autocast("cpu", torch.bfloat16):
            for errors, module in ((official, encoder()), (ours, GridEncoder(encoder(), "chunked"))):
                found = output_and_gradients(module, pixels)
                apart = [(found[name].double() - exact[name]).norm() / exact[name].norm() for name in exact]
                errors.append(float(torch.stack(apart).mean()))
    assert 0 < sum(ours) <= 1.04 * sum(official)


def test_reference_keeps_the_official_blocks() -> None:
    official = encoder()
    ours = GridEncoder(official, "reference")
    assert ours.blocks is official.blocks
    assert torch.equal(ours(noise(1, 3, 80, 80)), official(noise(1, 3, 80, 80)))


@pytest.mark.parametrize("way", WAYS)
def test_a_smaller_grid_has_its_part_of_the_positions(way: str) -> None:
    # An official encoder of 3 x 5 tokens whose tables are the parts that belong there, put in by hand.
    trained = encoder().double()
    with torch.no_grad():
        by_hand = encoder().double()
        by_hand.pos_embed = nn.Parameter(trained.pos_embed[:, :3])
        table = by_hand.blocks[1].attn.rel_pos_h  # rows i - j + 4 for 5 rows; 3 rows need i - j from -2 to 2
        by_hand.blocks[1].attn.rel_pos_h = nn.Parameter(table[2:7].clone())
        expected = by_hand(noise(2, 3, 48, 80).double())
        assert torch.allclose(GridEncoder(trained, way)(noise(2, 3, 48, 80).double()), expected, rtol=0, atol=1e-12)


def test_what_lies_under_the_image_does_not_matter_unpadded() -> None:
    # Padded, the tokens below are keys of global attention; unpadded there are none.
    model = build("vit_nano", image_size=64, grid="unpadded")
    with torch.no_grad():
        embedding = model.encode(noise(1, 3, 48, 64))
        assert embedding.shape == (1, 128, 6, 8)
        logits, _ = model.decode(embedding, torch.tensor([[4.0, 4.0, 40.0, 40.0]]))
        assert logits.shape == (1, 4, 24, 32)
    with pytest.raises(ValueError, match="sides up to that in steps of 16"):
        model.encode(noise(1, 3, 40, 64))
    with pytest.raises(ValueError, match="sides up to that"):
        model.encode(noise(1, 3, 48, 80))


def test_the_decoder_is_told_where_the_part_lies() -> None:
    # The same embedding on a grid as large as the frame and on its upper part: positions of the tokens must agree.
    model = build("vit_nano", image_size=64, grid="unpadded")
    seen: list[Tensor] = []
    hook = model.mask_decoder.transformer.register_forward_pre_hook(lambda _, args: seen.extend(args[1:]))
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    with torch.no_grad():
        model.decode(noise(1, 128, 4, 4), box)
        model.decode(noise(1, 128, 3, 4), box)
    hook.remove()
    whole, whole_tokens, part, part_tokens = seen
    assert torch.equal(part, whole[:, :, :3])
    assert torch.equal(part_tokens, whole_tokens)


def test_upstream_code_is_refused_unpadded() -> None:
    with pytest.raises(ConfigError, match="stretches relative positions") as caught:
        build("vit_nano", grid="unpadded", attention="reference")
    assert "model.grid=padded" in str(caught.value)


@pytest.mark.parametrize("grid", [(5, 7), (6, 6), (2, 3)])
def test_windows_and_back(grid: tuple[int, int]) -> None:
    x = noise(2, *grid, 4)
    tiles = partition(x, 3, torch.full((4,), 7.0))
    assert torch.equal(joined(tiles, 3, (2, *grid)), x)
    n_added = tiles.numel() - x.numel()
    assert int((tiles == 7).sum()) == n_added
    assert torch.equal(tiles[0, : min(3, grid[0]), :3], x[0, :3, :3])


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_checkpointing_changes_memory_alone(kind: str) -> None:
    parts = toy_sam(kind)
    image_encoder = GridEncoder(parts.image_encoder) if kind == "vit" else parts.image_encoder
    model = SamModel("toy", image_encoder, parts.prompt_encoder, parts.mask_decoder, 64)
    attach(model, MethodConfig(name="lora", rank=2, dropout=0.3), 0)
    model.train()
    kept: list[dict[int, int]] = []
    results = []
    for checkpointing in (False, True):
        model.image_encoder.checkpointing = checkpointing  # type: ignore[assignment]
        sizes: dict[int, int] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: (
                    sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
                ),
                lambda t: t,
            ):
                out = model.encode(noise(1, 3, 64, 64))
            model.zero_grad()
            out.square().mean().backward()
        kept.append(sizes)
        results.append([out.detach(), *(p.grad.clone() for p in model.image_encoder.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any(float(t.abs().max()) > 0 for t in results[0][1:])
    assert sum(kept[1].values()) < 0.7 * sum(kept[0].values())


def test_nothing_is_checkpointed_without_a_backward_pass() -> None:
    calls: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return x * 2

    with torch.no_grad():
        run_block(Counting(), noise(2), True)
    assert len(calls) == 1


class Upstream(nn.Module):
    """A module in the place of attention that knows nothing of grids: as upstream's, behind a scale."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_a_module_written_for_the_official_block_runs_in_ours() -> None:
    official, ours = encoder().double(), GridEncoder(encoder().double())
    for vit in (official, ours):
        for block in vit.blocks:
            block.attn = Upstream(block.attn)
    pixels = noise(1, 3, 80, 80).double()
    assert torch.allclose(ours(pixels), official(pixels), rtol=0, atol=1e-12)


def test_the_way_for_gpus_is_one_graph() -> None:
    """What breaks a graph keeps torch.compile from helping: 12 blocks with a break each are 13 pieces."""
    module = GridEncoder(encoder(), "augmented")
    found = torch._dynamo.explain(module)(noise(1, 3, 80, 80))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
