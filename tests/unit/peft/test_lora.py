from __future__ import annotations

import pickle
from functools import partial

import loralib
import pytest
import torch
from torch import nn
from toy_sam import predict, toy_batch, toy_sam, train_steps

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft import attach
from medsam_lora.peft.lora import LoraLinear, LoraQkv, LowRankOptions
from medsam_lora.peft.sites import AttentionSite, rows_as_thirds, rows_per_head
from medsam_lora.sam_modules import ImageEncoderViT, MaskDecoder, TwoWayTransformer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def site(rows: tuple, dim: int, heads: int) -> AttentionSite:
    q, k, v = rows
    return AttentionSite(0, "qkv", "proj", dim, heads, q, k, v, True)


def sam_of(width: int, depth: int, heads: int, global_blocks: tuple[int, ...]) -> nn.Module:
    """SAM's encoder and decoder without storage, to count on."""
    with torch.device("meta"):
        model = nn.Module()
        model.image_encoder = ImageEncoderViT(
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            global_attn_indexes=global_blocks,
            window_size=14,
        )
        model.mask_decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048))
    return model


@pytest.fixture(scope="module")
def vit_b() -> nn.Module:
    return sam_of(768, 12, 12, (2, 5, 8, 11))


@pytest.mark.parametrize(
    ("rank", "targets", "count"),
    [
        (4, ["q", "v"], 147_456),  # 12 blocks x 2 targets x 2 matrices x 768 x 4
        (8, ["q", "v"], 294_912),
        (64, ["q", "v"], 2_359_296),
        (512, ["q", "v"], 18_874_368),
        (4, ["q", "k", "v"], 221_184),
        (4, ["q", "v", "mlp"], 516_096),  # + 12 x 2 Linears x 4 x (768 + 3072)
        (4, ["proj"], 73_728),
    ],
)
def test_count_on_vit_b(vit_b: nn.Module, rank: int, targets: list, count: int) -> None:
    config = MethodConfig(name="lora", rank=rank, targets=targets, decoder="frozen")
    adaptation = attach(vit_b, config, 0)
    adaptation.detach()
    assert adaptation.report.count == count


@pytest.mark.parametrize(
    ("name", "count"), [("zero_shot", 0), ("decoder_only", 4_058_340), ("full", 93_729_252), ("lora", 4_353_252)]
)
def test_count_of_every_method_on_vit_b(vit_b: nn.Module, name: str, count: int) -> None:
    # full: encoder 89,670,912 + decoder 4,058,340; lora: rank 8 on q and v 294,912 + decoder.
    adaptation = attach(vit_b, MethodConfig(name=name), 0)
    adaptation.detach()
    assert adaptation.report.count == count


@pytest.mark.parametrize(("size", "count"), [((1024, 24, 16, (5,)), 393_216), ((1280, 32, 16, (7,)), 655_360)])
def test_count_on_vit_l_and_vit_h(size: tuple, count: int) -> None:
    assert attach(sam_of(*size), MethodConfig(name="lora", rank=4, decoder="frozen"), 0).report.count == count


def test_a_fused_projection_by_hand() -> None:
    # One head of two features: rows q0 q1 k0 k1 v0 v1. x = (1, 2).
    base = nn.Linear(2, 6)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [2, 0], [0, 3]]))
        base.bias.copy_(torch.tensor([0.0, 0, 0, 5, 0, 0]))
    layer = LoraQkv(base, site(rows_as_thirds(2), 2, 1), ["q", "v"], LowRankOptions(rank=1, alpha=3.0), generator())
    with torch.no_grad():
        layer.branch("q").A.copy_(torch.tensor([[1.0, 1.0]]))  # A x = 3
        layer.branch("q").B.copy_(torch.tensor([[1.0], [-1.0]]))  # scale 3: (9, -9)
        layer.branch("v").A.copy_(torch.tensor([[0.0, 0.5]]))  # A x = 1
        layer.branch("v").B.copy_(torch.tensor([[0.0], [2.0]]))  # scale 3: (0, 6)
    #                      W x + b:  1       2   3  5  2   6
    expected = torch.tensor([[1.0 + 9, 2.0 - 9, 3, 5, 2, 6.0 + 6]])
    assert torch.equal(layer(torch.tensor([[1.0, 2.0]])), expected)
    merged = layer.merged_state()["weight"]
    assert merged.tolist() == [[4, 3], [-3, -2], [1, 1], [0, 0], [2, 0], [0, 6]]


def test_a_fused_projection_laid_out_per_head_against_a_dense_oracle() -> None:
    width, heads = 12, 3
    where = site(rows_per_head(heads, width // heads), width, heads)
    base = nn.Linear(width, 3 * width)
    layer = LoraQkv(base, where, ["k", "v"], LowRankOptions(rank=2, alpha=5.0), generator())
    with torch.no_grad():
        for projection in ("k", "v"):
            layer.branch(projection).B.normal_(generator=generator(1))
    dense = base.weight.detach().clone()
    for projection, offset in (("k", 4), ("v", 8)):
        delta = 2.5 * layer.branch(projection).B @ layer.branch(projection).A
        for head in range(heads):
            for feature in range(4):
                dense[head * 12 + offset + feature] += delta[head * 4 + feature].detach()
    x = torch.randn(2, 5, width, generator=generator(2))
    assert torch.allclose(layer(x), nn.functional.linear(x, dense, base.bias), atol=1e-5)
    assert torch.allclose(layer.merged_state()["weight"], dense, atol=1e-6)


def test_a_whole_linear_by_hand() -> None:
    base = nn.Linear(2, 1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        base.bias.fill_(10.0)
    layer = LoraLinear(base, LowRankOptions(rank=1, alpha=0.5), generator())
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[4.0, 0.0]]))
        layer.lora_B.copy_(torch.tensor([[3.0]]))
    # 1 + 4 + 10 + 0.5 * 3 * 4 * 1
    assert layer(torch.tensor([[1.0, 2.0]])).item() == 21.0
    assert layer.merged_state()["weight"].tolist() == [[7.0, 2.0]]


def test_the_layers_are_loralibs_and_never_merge_by_themselves() -> None:
    base = nn.Linear(4, 12)
    start = base.weight.detach().clone()
    options = LowRankOptions(2, 2.0)
    whole = LoraLinear(base, options, generator())
    fused = LoraQkv(base, site(rows_as_thirds(4), 4, 1), ["q"], options, generator())
    for layer in (whole, fused):
        assert isinstance(layer, loralib.LoRALayer)
        assert layer.weight is base.weight
        for parameter in layer.parameters():
            if parameter is not base.weight:
                nn.init.normal_(parameter, generator=generator())
        for mode in (False, True, False):
            layer.train(mode)
            assert not layer.merged
            assert torch.equal(base.weight, start)
        assert len(pickle.dumps(layer)) > 0  # stock loralib layers hold a lambda


def test_names_do_not_depend_on_the_wrapping() -> None:
    model = toy_sam("vit")
    base = list(model.state_dict())
    adaptation = attach(model, MethodConfig(name="lora", rank=2, targets=["q", "proj", "mlp"], decoder="frozen"), 0)
    assert list(adaptation.state())[:8] == [
        "image_encoder.blocks.0.attn.qkv.lora_q.A",
        "image_encoder.blocks.0.attn.qkv.lora_q.B",
        "image_encoder.blocks.0.attn.proj.lora_A",
        "image_encoder.blocks.0.attn.proj.lora_B",
        "image_encoder.blocks.0.mlp.lin1.lora_A",
        "image_encoder.blocks.0.mlp.lin1.lora_B",
        "image_encoder.blocks.0.mlp.lin2.lora_A",
        "image_encoder.blocks.0.mlp.lin2.lora_B",
    ]
    with_adapter = list(model.state_dict())
    assert [name for name in with_adapter if name not in adaptation.state()] == base


@pytest.mark.parametrize(
    ("blocks", "adapted", "cache_point"),
    [(None, set(range(10)), None), ([-2, -1], {8, 9}, "block 8"), ([3], {3}, "block 3"), ([0, 5], {0, 5}, None)],
)
def test_only_the_chosen_blocks_are_adapted(blocks: list[int] | None, adapted: set[int], cache_point: str) -> None:
    model = toy_sam("tiny_vit")
    adaptation = attach(model, MethodConfig(name="lora", blocks=blocks, decoder="frozen"), 0)
    names = [site.qkv for site in model.image_encoder.attention_sites()]
    found = {i for i, n in enumerate(names) for tensor in adaptation.report.tensors if f".{n}." in tensor.name}
    assert found == adapted
    assert adaptation.report.cache_point == cache_point


def test_the_cache_point_is_upstream_of_all_change() -> None:
    model = toy_sam("tiny_vit")
    adaptation = attach(model, MethodConfig(name="lora", blocks=[-2, -1]), 0)
    blocks = [model.image_encoder.get_submodule(f"layers.3.blocks.{i}") for i in (0, 1)]
    inputs: list[list[torch.Tensor]] = []
    handles = [b.register_forward_pre_hook(lambda m, args: inputs[-1].append(args[0].clone())) for b in blocks]
    for train in (False, True):
        if train:
            parameters = [p for group in adaptation.parameters_by_group().values() for p in group]
            inputs.append([])
            train_steps(model, parameters)
        inputs.append([])
        with torch.no_grad():
            predict(model, *toy_batch()[:2])
    for handle in handles:
        handle.remove()
    first, last = inputs[0], inputs[-1]
    assert torch.equal(first[0], last[0])  # input of block 8, the cache point
    assert not torch.equal(first[1], last[1])  # input of block 9


def test_dropout_acts_in_training_only() -> None:
    base = nn.Linear(8, 24)
    x = torch.ones(1, 8)
    options = LowRankOptions(rank=2, alpha=2.0, dropout=0.5)
    layers = [
        LoraQkv(base, site(rows_as_thirds(8), 8, 2), ["q", "k", "v"], options, generator()),
        LoraLinear(base, options, generator()),
    ]
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if name.endswith("B"):
                nn.init.ones_(parameter)
        layer.eval()
        assert torch.equal(layer(x), layer(x))
        layer.train()
        draws = torch.cat([layer(x) for _ in range(8)]).detach()
        assert draws.std(dim=0).max() > 0


def test_a_step_under_autocast() -> None:
    model = toy_sam("tiny_vit")
    adaptation = attach(model, MethodConfig(name="lora", targets=["q", "k", "v", "proj", "mlp"]), 0)
    pixels, boxes, _ = toy_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = predict(model, pixels, boxes)
    logits.float().square().mean().backward()
    gradient = dict(model.named_parameters())["image_encoder.layers.1.blocks.0.attn.qkv.lora_v.B"].grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert adaptation.state()["image_encoder.layers.1.blocks.0.attn.qkv.lora_v.B"].dtype == torch.float32


@pytest.mark.parametrize("blocks", [[2], [-3], [0, 0], []])
def test_impossible_blocks_are_refused_before_anything_changes(blocks: list[int]) -> None:
    model = toy_sam("vit")
    with pytest.raises(ConfigError, match=r"method\.blocks"):
        attach(model, MethodConfig(name="lora", blocks=blocks), 0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_target_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        attach(toy_sam("vit"), MethodConfig(name="lora", targets=["q", "q"]), 0)


@pytest.mark.parametrize("rows", [rows_as_thirds(3), rows_per_head(2, 2), ((range(4),), (range(4),), (range(4),))])
def test_a_site_that_does_not_fit_its_linear_is_refused(rows: tuple) -> None:
    base = nn.Linear(4, 11 if rows == rows_per_head(2, 2) else 12)
    with pytest.raises(AdapterError, match="not what its encoder says"):
        LoraQkv(base, site(rows, 4, 1), ["q"], LowRankOptions(1, 1.0), generator())
