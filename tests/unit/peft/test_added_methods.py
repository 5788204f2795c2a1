"""Adapters, prompts and reconstructed weights against plain formulas, and combinations of methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy_sam import ENCODERS, PROMPT_DIM, predict, toy_batch, toy_sam

from medsam_lora.config import MethodConfig, TrainConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.models.footprint import StepOptions, dry
from medsam_lora.models.vit import GridEncoder
from medsam_lora.peft import attach, method_spec
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.sites import attention_sites, mlp_sites
from medsam_lora.sam_modules import ImageEncoderViT
from medsam_lora.training.optimiser import build_optimiser


def shaken(model: nn.Module, config: MethodConfig) -> Adaptation:
    """The adaptation away from its start."""
    adaptation = attach(model, config, 0)
    draw = torch.Generator().manual_seed(3)
    adaptation.load({k: v + 0.3 * torch.randn(v.shape, generator=draw) for k, v in adaptation.state().items()})
    return adaptation


def call(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Input and output of a module of the image encoder in one forward pass."""
    seen: list[Tensor] = []
    module = model.image_encoder.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.extend((args[0], out)))
    with torch.no_grad():
        model.image_encoder(toy_batch(1)[0])
    handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_serial_adapter(encoder: str) -> None:
    model = toy_sam(encoder)
    sites, mlps = attention_sites(model.image_encoder), mlp_sites(model.image_encoder)
    shaken(model, MethodConfig(name="adapter", bottleneck=3, decoder="frozen"))
    for name in (sites[1].proj, mlps[1].fc2):
        x, out = call(model, name)
        module = model.image_encoder.get_submodule(name)
        h = nn.functional.linear(x, module.weight, module.bias)
        down, _, up = module.adapter
        assert torch.allclose(out, h + up(nn.functional.gelu(down(h))), atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_parallel_adapter_sees_the_normalised_input(encoder: str) -> None:
    model, base = toy_sam(encoder), toy_sam(encoder)
    site = mlp_sites(model.image_encoder)[1]
    shaken(model, MethodConfig(name="adaptformer", bottleneck=3, adapter_scale=0.5, decoder="frozen"))
    x, out = call(model, site.name)
    plain, module = base.image_encoder.get_submodule(site.name), model.image_encoder.get_submodule(site.name)
    normed = plain.norm(x) if encoder == "tiny_vit" else x
    down, _, up = module.adapter
    assert torch.allclose(out, plain(x) + 0.5 * up(down(normed).relu()), atol=1e-6)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_prompt_generator_stands_before_its_block(encoder: str) -> None:
    model, base = toy_sam(encoder), toy_sam(encoder)
    name = attention_sites(model.image_encoder)[1].name
    shaken(model, MethodConfig(name="prompt_generator", decoder="frozen"))
    x, out = call(model, name)
    added = model.image_encoder.get_submodule(name).prompt_generator(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert added.abs().max() > 0.1
    assert torch.allclose(out, base.image_encoder.get_submodule(name)(x + added), atol=1e-6)


def heads_of(qkv: Tensor, site: object) -> list[Tensor]:
    """q, k, v of a fused output (..., rows) as (..., heads, d)."""
    return [qkv[..., site.rows(p)].unflatten(-1, (site.heads, -1)) for p in ("q", "k", "v")]


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_prefix_by_its_formula_cell_by_cell(encoder: str) -> None:
    model, base = toy_sam(encoder), toy_sam(encoder)
    site = attention_sites(model.image_encoder)[1]
    shaken(model, MethodConfig(name="prefix", tokens=3, decoder="frozen"))
    x, out = call(model, site.attention)
    attention, plain = (m.image_encoder.get_submodule(site.attention) for m in (model, base))
    norm = plain.norm(x) if encoder == "tiny_vit" else x
    q, _, _ = heads_of(plain.qkv(norm), site)
    added = torch.zeros_like(q)
    for h in range(site.heads):
        k, v, gate = attention.prefix_k[h], attention.prefix_v[h], attention.prefix_gate[h]
        weights = (q[..., h, :] @ k.T / k.shape[1] ** 0.5).softmax(dim=-1)
        added[..., h, :] = gate.tanh() * weights @ v
    expected = plain(x) + added.flatten(-2) @ plain.proj.weight.T
    assert torch.allclose(out, expected, atol=1e-5)
    assert not torch.allclose(out, plain(x), atol=1e-2)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_deep_prompts_are_keys_and_values_of_every_window(encoder: str) -> None:
    model, base = toy_sam(encoder), toy_sam(encoder)
    site = attention_sites(model.image_encoder)[0]
    shaken(model, MethodConfig(name="vpt_deep", tokens=2, decoder="frozen"))
    x, out = call(model, site.attention)
    attention, plain = (m.image_encoder.get_submodule(site.attention) for m in (model, base))
    norm = base.image_encoder.get_submodule(site.norm)
    _, k, v = heads_of(plain.qkv(norm(attention.prompt_tokens)), site)
    # Attention over more keys is a mean, by their shares of the softmax, of that over the real keys and that over the
    # tokens. The share needs the real scores: their log-sum-exp, from a probe of the base's own attention.
    inside = plain.norm(x) if encoder == "tiny_vit" else x
    cells = inside.flatten(1, -2)
    q, keys, values = heads_of(plain.qkv(cells), site)
    scale = q.shape[-1] ** -0.5
    for h in range(site.heads):
        own = q[..., h, :] @ keys[..., h, :].transpose(-2, -1) * scale + position_scores(plain, q[..., h, :], h, x)
        extra = q[..., h, :] @ k[:, h].T * scale
        weights = torch.cat([own, extra], dim=-1).softmax(dim=-1)
        mixed = weights @ torch.cat([values[..., h, :], v[:, h].expand(len(cells), -1, -1)], dim=1)
        q[..., h, :] = mixed  # reused as the place for the result of this head
    assert torch.allclose(out.flatten(1, -2), plain.proj(q.flatten(-2)), atol=1e-5)


def position_scores(attention: nn.Module, q: Tensor, head: int, x: Tensor) -> Tensor:
    """What relative positions add to the scores (n, N, N) of one head, pair by pair."""
    n, cells, _ = q.shape
    added = torch.zeros(n, cells, cells)
    if hasattr(attention, "attention_biases"):
        return added + attention.attention_biases[head][attention.bias_index]
    side = x.shape[1]
    for i in range(cells):
        for j in range(cells):
            down, across = i // side - j // side + side - 1, i % side - j % side + side - 1
            added[:, i, j] = q[:, i] @ (attention.rel_pos_h[down] + attention.rel_pos_w[across])
    return added


@pytest.mark.parametrize("bases", [False, True])
@torch.no_grad()
def test_the_reconstructed_weight(bases: bool) -> None:
    model, base = toy_sam("vit"), toy_sam("vit")
    config = MethodConfig(name="sam_parser", layers=["neck", "patch", "linears"], bases=bases, decoder="frozen")
    adaptation = attach(model, config, 0)
    draw = torch.Generator().manual_seed(3)
    adaptation.load({k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in adaptation.state().items()})
    for edit in adaptation.edits:
        layer = edit.adapted
        # U S (1 + d) Vh, whatever way it is computed.
        values = layer.singular_values * (1 + layer.singular_delta)
        dense = layer.singular_u @ torch.diag(values) @ layer.singular_vh
        assert torch.allclose(layer.reconstructed().flatten(1), dense, atol=1e-5)
    start = base.image_encoder.neck[2].weight
    # The singular values of a reconstructed weight are the trained ones.
    if not bases:
        layer = model.image_encoder.neck[2]
        wanted = (layer.singular_values * (1 + layer.singular_delta)).sort(descending=True).values
        assert torch.allclose(torch.linalg.svdvals(layer.reconstructed().flatten(1)), wanted, atol=1e-5)
        assert not torch.allclose(layer.reconstructed(), start, atol=1e-3)


class Like:
    """What `build_optimiser` asks of a segmenter."""

    def __init__(self, adaptation: Adaptation) -> None:
        self.adaptation = adaptation
        self.trainable_groups = adaptation.parameters_by_group


def test_groups_of_the_optimiser_follow_the_rules_of_the_method() -> None:
    options = TrainConfig(lr=1e-4, lr_encoder=2e-4, weight_decay=0.1)
    config = MethodConfig(name="sam_parser+lora", bases=True, lora_plus=8.0, lr_singular=3e-3)
    adaptation = attach(toy_sam("vit"), config, 0)
    groups = {g["name"]: g for g in build_optimiser(Like(adaptation), options).param_groups}  # type: ignore[arg-type]
    rates = {name: group["lr"] for name, group in groups.items()}
    assert rates == pytest.approx(
        {
            "encoder.singular/vectors": 3e-3,
            "encoder.bases": 2e-4,
            "encoder": 2e-4,
            "encoder.B": 1.6e-3,
            "decoder": 1e-4,
            "decoder/vectors": 1e-4,
        }
    )
    # Neither the coefficients nor the bases, which hold weights of the base model.
    decays = {name for name, group in groups.items() if group["weight_decay"] == 0.1}
    assert decays == {"encoder", "encoder.B", "decoder"}
    members = [p for group in groups.values() for p in group["params"]]
    assert len({id(p) for p in members}) == len(members) == len(adaptation.state())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("full+lora", "both change image_encoder.blocks.0.attn.qkv.weight"),
        ("full+sam_parser", "both change image_encoder.neck.0.weight"),
        ("bitfit+layernorm", "both change image_encoder.blocks.0.norm1.bias"),
        ("prefix+vpt_deep", "both change image_encoder.blocks.0.attn"),
        ("lora+lora", "named twice"),
        ("lora+sam_praser", "unknown method 'sam_praser'; did you mean sam_parser"),
        ("lora+", "unknown method ''"),
    ],
)
def test_methods_that_cannot_be_combined(name: str, words: str) -> None:
    model = toy_sam("vit")
    with pytest.raises(ConfigError, match=words):
        attach(model, MethodConfig(name=name), 0)
    # The model is free again.
    attach(model, MethodConfig(name="lora"), 0).detach()


@pytest.mark.parametrize("options", [{"lora_plus": 4.0}, {"init": "pissa"}, {"init": "pissa", "lora_plus": 4.0}, {}])
def test_low_rank_branches_of_the_decoder_are_trained_once_in_a_combination(options: dict) -> None:
    alone = attach(toy_sam("vit"), MethodConfig(name="bitfit", decoder="lora", rank=2, **options), 0)
    both = attach(toy_sam("vit"), MethodConfig(name="bitfit+prefix", decoder="lora", rank=2, **options), 0)
    of_decoder = [t for t in both.report.tensors if t.name.startswith("mask_decoder.")]
    assert {t.name for t in of_decoder} == {t.name for t in alone.report.tensors if t.name.startswith("mask_decoder.")}
    assert {t.group.partition(".")[0] for t in of_decoder} == {"decoder"}


@torch.no_grad()
def test_a_combination_is_its_parts_at_once() -> None:
    pixels, boxes, _ = toy_batch()
    parts = {}
    for name in ("lora", "layernorm"):
        parts.update(shaken(toy_sam("vit"), MethodConfig(name=name, rank=2)).state())
    model = toy_sam("vit")
    both = attach(model, MethodConfig(name="lora+layernorm", rank=2), 0)
    assert set(both.state()) == set(parts)
    both.load(parts)
    merged = toy_sam("vit")
    merged.load_state_dict(both.merge())
    assert torch.allclose(predict(merged, pixels, boxes)[0], predict(model, pixels, boxes)[0], atol=1e-5)
    norm = model.image_encoder.blocks[0].norm1
    assert torch.equal(norm.weight, parts["image_encoder.blocks.0.norm1.weight"])
    assert method_spec("lora+layernorm").mergeable and not method_spec("lora+prefix").mergeable


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("sam_parser+decoder_only", "trunk"),
        ("lora+sam_parser", "block 1"),
        ("prompt_tokens+decoder_only", "embedding"),
        ("bitfit+decoder_only", None),
    ],
)
def test_the_cache_point_of_a_combination_is_the_earliest(name: str, point: str | None) -> None:
    assert attach(toy_sam("vit"), MethodConfig(name=name, blocks=[1]), 0).report.cache_point == point


def on_a_grid(name: str, ours: bool) -> tuple[nn.Module, torch.Tensor]:
    """An encoder of 5 x 5 cells in windows of 3, upstream's or ours around it, adapted and away from its start."""
    model = toy_sam("vit")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = ImageEncoderViT(
            80, 16, embed_dim=32, depth=2, num_heads=2, out_chans=PROMPT_DIM, use_rel_pos=True, window_size=3,
            global_attn_indexes=(1,),
        )  # fmt: skip
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.image_encoder = GridEncoder(encoder, "auto") if ours else encoder
    shaken(model, MethodConfig(name=name, tokens=3, decoder="frozen"))
    return model, torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["prefix", "vpt_deep"])
def test_keys_beside_the_grid_are_the_same_without_a_matrix_of_scores(name: str) -> None:
    found = []
    for ours in (False, True):
        model, pixels = on_a_grid(name, ours)
        model.double()
        out = model.image_encoder(pixels.double())
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) > 2
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9 * float(a.detach().abs().max()))


@pytest.mark.parametrize("name", ["prefix", "vpt_deep"])
def test_keys_beside_the_grid_keep_no_matrix_of_scores(name: str) -> None:
    method = MethodConfig(name=name, decoder="frozen")
    plain = dry(StepOptions("vit_nano", MethodConfig(name="lora", decoder="frozen"), (256, 256), 1, 256))
    own = dry(StepOptions("vit_nano", method, (256, 256), 1, 256))
    # Two global blocks of 6 heads and 1024 tokens would keep 48 MiB more.
    assert own.saved_bytes - plain.saved_bytes < 24 * 2**20


def test_an_attention_that_does_not_say_how_it_is_computed_is_refused() -> None:
    from medsam_lora.peft.attention import take_apart

    with pytest.raises(AdapterError, match="does not say how it is computed"):
        take_apart(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_the_depth_branch_by_its_formula_cell_by_cell(encoder: str) -> None:
    model = toy_sam(encoder)
    site = attention_sites(model.image_encoder)[0]
    shaken(model, MethodConfig(name="sd_trans", depth=3, decoder="frozen"))
    block = model.image_encoder.get_submodule(site.name)
    x = torch.randn(6, 5, 3, site.dim_in, generator=torch.Generator().manual_seed(1))
    out = block.across(x)
    qkv, norm, proj = (model.image_encoder.get_submodule(name) for name in (site.qkv, site.norm, site.proj))
    for stack, row, column in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        cell = x[3 * stack : 3 * stack + 3, row, column]
        q, k, v = (part.transpose(0, 1) for part in heads_of(qkv(norm(cell)), site))
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        expected = (weights @ v).transpose(0, 1).flatten(1) @ proj.weight.T + proj.bias
        assert torch.allclose(out[3 * stack : 3 * stack + 3, row, column], expected, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
@torch.no_grad()
def test_stacks_never_mix_and_neighbours_do(encoder: str) -> None:
    model = toy_sam(encoder)
    shaken(model, MethodConfig(name="sd_trans", depth=3, decoder="frozen"))
    pixels = toy_batch(6)[0]
    before = model.image_encoder(pixels)
    other_case = pixels.clone()
    other_case[3:] = other_case[[5, 3, 4]] + 1
    assert torch.equal(model.image_encoder(other_case)[:3], before[:3])
    neighbour = pixels.clone()
    neighbour[2] += 1
    after = model.image_encoder(neighbour)
    assert (after[:2] - before[:2]).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert torch.equal(after[3:], before[3:])
    with pytest.raises(ValueError, match="4 images are no stacks of 3 slices"):
        model.image_encoder(pixels[:4])


def test_the_depth_of_a_stack() -> None:
    model = toy_sam("vit")
    with pytest.raises(ConfigError, match="needs one in its middle"):
        attach(model, MethodConfig(name="sd_trans", depth=2), 0)
    adaptation = attach(model, MethodConfig(name="sd_trans+layernorm", depth=5, decoder="frozen"), 0)
    # Three bottlenecks of 32 -> 8 -> 32 in two blocks; LayerNorms of the blocks and the neck.
    assert adaptation.report.count == 2 * 3 * (2 * 32 * 8 + 8 + 32) + 4 * 2 * 32 + 4 * 32
    assert adaptation.report.depth == 5
    pixels, _, _ = toy_batch(5)
    base = toy_sam("vit").image_encoder(pixels)
    assert torch.equal(model.image_encoder(pixels), base)
