"""Variants of the low-rank branch against dense arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_sam import ENCODERS, predict, toy_batch, toy_sam, train_steps

from medsam_lora.config import MethodConfig, build_config
from medsam_lora.errors import ConfigError
from medsam_lora.peft import attach
from medsam_lora.peft.contract import GroupRule
from medsam_lora.peft.low_rank import LoraLinear, LoraQkv, LowRankOptions
from medsam_lora.peft.sites import AttentionSite, rows_as_thirds, rows_per_head


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fused(layout: str, options: LowRankOptions) -> tuple[nn.Linear, LoraQkv, AttentionSite]:
    width, heads = 12, 3
    q, k, v = rows_as_thirds(width) if layout == "thirds" else rows_per_head(heads, width // heads)
    site = AttentionSite(0, "qkv", "proj", width, heads, q, k, v, True)
    base = nn.Linear(width, 3 * width)
    nn.init.normal_(base.weight, generator=generator(3))
    nn.init.normal_(base.bias, generator=generator(4))
    return base, LoraQkv(base, site, ["q", "v"], options, generator()), site


def moved(module: nn.Module, names: tuple[str, ...]) -> None:
    draw = generator(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(names):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize(("scaling", "scale"), [("alpha/r", 1.5), ("alpha/sqrt(r)", 3.0), ("none", 1.0)])
def test_the_scale(scaling: Any, scale: float) -> None:
    base = nn.Linear(5, 7)
    layer = LoraLinear(base, LowRankOptions(4, 6.0, scaling=scaling), generator())
    moved(layer, ("lora_B",))
    delta = layer.merged_state()["weight"] - base.weight
    assert torch.allclose(delta, scale * layer.lora_B @ layer.lora_A, atol=1e-6)
    x = torch.randn(3, 5, generator=generator(2))
    assert torch.allclose(layer(x), base(x) + x @ delta.T, atol=1e-5)


@pytest.mark.parametrize("layout", ["thirds", "per_head"])
def test_dora_scales_rows_to_their_magnitudes(layout: str) -> None:
    base, layer, site = fused(layout, LowRankOptions(2, 3.0, dora=True))
    x = torch.randn(4, 12, generator=generator(2))
    assert torch.equal(layer(x), base(x))
    moved(layer, (".A", ".B", ".magnitude"))
    dense = base.weight.detach().clone()
    for projection in ("q", "v"):
        rows, branch = site.rows(projection), layer.branch(projection)
        changed = base.weight[rows] + 1.5 * branch.B @ branch.A
        direction = changed / changed.norm(dim=1, keepdim=True)
        dense[rows] = (branch.get_parameter("magnitude")[:, None] * direction).detach()
    assert torch.allclose(layer.merged_state()["weight"], dense, atol=1e-5)
    assert torch.allclose(layer(x), nn.functional.linear(x, dense, base.bias), atol=1e-4)
    # The rows of the merged weight have exactly the trained magnitudes.
    assert torch.allclose(dense[site.rows("q")].norm(dim=1), layer.branch("q").get_parameter("magnitude"), atol=1e-5)


def test_the_gradient_of_dora_is_that_of_its_dense_formula() -> None:
    base = nn.Linear(6, 5).double()
    layer = LoraLinear(base, LowRankOptions(2, 2.0, dora=True), generator())
    moved(layer, ("lora_A", "lora_B", "lora_magnitude"))
    layer.double()
    # The kept squares of the rows were made in the weight's own type.
    x, g = torch.randn(3, 6, generator=generator(2)).double(), torch.randn(3, 5, generator=generator(5)).double()
    (layer(x) * g).sum().backward()
    own = [layer.lora_A.grad.clone(), layer.lora_B.grad.clone(), layer.lora_magnitude.grad.clone()]
    leaves = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude)]
    a, b, m = leaves
    changed = base.weight.detach() + b @ a
    out = x @ (m[:, None] * changed / changed.norm(dim=1, keepdim=True)).T + base.bias.detach()
    (out * g).sum().backward()
    for found, leaf in zip(own, leaves, strict=True):
        assert torch.allclose(found, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["thirds", "per_head"])
def test_pissa_starts_at_the_largest_singular_values_and_recovers_the_base(layout: str) -> None:
    base, layer, site = fused(layout, LowRankOptions(3, 6.0, init="pissa"))
    kept = base.weight.detach().clone()
    x = torch.randn(4, 12, generator=generator(2))
    assert torch.equal(layer(x), base(x))
    for projection in ("q", "v"):
        weight, branch = kept[site.rows(projection)], layer.branch(projection)
        u, s, vh = torch.linalg.svd(weight)
        best = (u[:, :3] * s[:3]) @ vh[:3]
        assert torch.allclose(2.0 * branch.B @ branch.A, best, atol=1e-5)
        # A and B share the singular values evenly.
        assert torch.allclose(branch.A.norm(dim=1), branch.B.norm(dim=0), atol=1e-5)
    assert torch.equal(layer.merged_state()["weight"], kept)
    moved(layer, (".A", ".B"))
    assert torch.equal(base.weight, kept)
    merged = layer.merged_state()["weight"]
    assert not torch.allclose(merged, kept, atol=1e-2)
    assert torch.allclose(layer(x), nn.functional.linear(x, merged, base.bias), atol=1e-4)


def test_pissa_from_file_does_not_depend_on_the_signs_of_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LowRankOptions(2, 2.0, init="pissa")
    base = nn.Linear(6, 5)
    layer = LoraLinear(base, options, generator())
    moved(layer, ("lora_A", "lora_B"))
    x = torch.randn(3, 6, generator=generator(2))
    real = torch.linalg.svd

    def flipped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = real(*args, **kwargs)
        return -u, s, -vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    other = LoraLinear(base, options, generator())
    other.load_state_dict(layer.state_dict())
    assert torch.allclose(other(x), layer(x), atol=1e-5)


def test_options_that_contradict_each_other_are_refused() -> None:
    model = toy_sam("vit")
    with pytest.raises(ConfigError, match=r"method.dora and method.init=pissa"):
        attach(model, MethodConfig(name="lora", dora=True, init="pissa"), 0)
    with pytest.raises(ConfigError, match="has 32 singular values"):
        attach(model, MethodConfig(name="lora", rank=33, init="pissa"), 0)
    attach(model, MethodConfig(name="lora", rank=33), 0).detach()


@pytest.mark.parametrize(
    ("encoder", "blocks", "adapted", "cache_point"),
    [
        ("vit", "global", [1], "block 1"),
        ("vit", "last 2", [0, 1], None),
        ("tiny_vit", "last 3", [7, 8, 9], "block 7"),
    ],
)
def test_blocks_by_name(encoder: str, blocks: str, adapted: list[int], cache_point: str | None) -> None:
    model = toy_sam(encoder)
    report = attach(model, MethodConfig(name="lora", blocks=blocks, decoder="frozen"), 0).report
    every = [tensor.name.rsplit(".", 2)[0] for tensor in report.tensors]
    names = [f"blocks.{i}.attn" for i in adapted]
    if encoder == "tiny_vit":
        names = ["layers.2.blocks.5.attn", "layers.3.blocks.0.attn", "layers.3.blocks.1.attn"]
    assert list(dict.fromkeys(every)) == [f"image_encoder.{name}.qkv" for name in names]
    assert report.cache_point == cache_point


def test_what_runs_before_the_cache_point_is_never_changed() -> None:
    """The input of the first adapted block is the same, bit for bit, before and after training."""
    model = toy_sam("tiny_vit")
    seen: list[Tensor] = []
    model.image_encoder.layers[2].blocks[5].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    pixels, boxes, _ = toy_batch()
    with torch.no_grad():
        predict(model, pixels, boxes)
    adaptation = attach(model, MethodConfig(name="lora", blocks="last 3"), 0)
    assert adaptation.report.cache_point == "block 7"
    train_steps(model, [p for group in adaptation.parameters_by_group().values() for p in group])
    seen[1:] = []
    with torch.no_grad():
        predict(model, pixels, boxes)
    assert torch.equal(*seen)


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match="no block of this encoder has global attention"):
        attach(toy_sam("tiny_vit"), MethodConfig(name="lora", blocks="global"), 0)
    with pytest.raises(ConfigError, match="the encoder has 2 attention blocks"):
        attach(toy_sam("vit"), MethodConfig(name="lora", blocks="last 3"), 0)
    with pytest.raises(ConfigError, match=r"method.blocks"):
        build_config({"method": {"blocks": "first 2"}})


@pytest.mark.parametrize("encoder", ENCODERS)
def test_lora_plus_gives_every_b_a_group_of_its_own(encoder: str) -> None:
    model = toy_sam(encoder)
    config = MethodConfig(name="lora", rank=2, lora_plus=16.0, decoder="lora", targets=["q", "mlp"])
    adaptation = attach(model, config, 0)
    of_b = {t.name for t in adaptation.report.tensors if t.group in ("encoder.B", "decoder.B")}
    assert of_b == {t.name for t in adaptation.report.tensors if t.name.endswith((".B", "lora_B"))}
    assert {rule.lr_factor for rule in adaptation.rules.values()} == {16.0}
    assert set(attach(toy_sam(encoder), MethodConfig(name="lora"), 0).parameters_by_group()) == {"encoder", "decoder"}


@pytest.mark.parametrize("plus", [1.0, 4.0])
def test_pissa_is_trained_without_weight_decay(plus: float) -> None:
    """A and B hold the largest singular values of the base, which it would shrink."""
    config = MethodConfig(name="lora", rank=2, init="pissa", lora_plus=plus, targets=["q", "mlp"])
    adaptation = attach(toy_sam("vit"), config, 0)
    decays = {name: adaptation.rules.get(name, GroupRule()).weight_decay for name in adaptation.parameters_by_group()}
    own = {"encoder.pissa": False} | ({} if plus == 1 else {"encoder.B": False})
    assert decays == own | {"decoder": True}
    assert adaptation.rules.get("encoder.B", GroupRule()).lr_factor == plus


def test_the_scale_of_a_sweep_with_fixed_alpha() -> None:
    assert [LowRankOptions(r, 8.0).scale for r in (4, 8, 64)] == [2.0, 1.0, 0.125]
    assert LowRankOptions(64, 8.0, scaling="alpha/sqrt(r)").scale == 8.0 / math.sqrt(64)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {}], ids=["dora", "pissa", "plain"])
def test_merging_into_a_base_of_half_precision(half: torch.dtype, options: dict[str, Any]) -> None:
    """The merged weight is that of the same tensors in float64, rounded once."""
    model = toy_sam("vit").to(half)
    adaptation = attach(model, MethodConfig(name="lora", rank=2, decoder="frozen", targets=["q", "mlp"], **options), 0)
    draw = generator(1)
    state = {k: v + 0.1 * torch.randn(v.shape, generator=draw).to(v) for k, v in adaptation.state().items()}
    adaptation.load(state)
    merged = adaptation.merge()
    assert {tensor.dtype for tensor in merged.values()} == {half}
    name = "image_encoder.blocks.0.mlp.lin1"
    layer = model.get_submodule(name)
    weight = layer.weight.detach().double()
    dense = weight + 4.0 * state[f"{name}.lora_B"].double() @ state[f"{name}.lora_A"].double()
    if "init" in options:
        dense -= 4.0 * (layer.lora_start_B.double() @ layer.lora_start_A.double())
    if "dora" in options:
        # The squares of the base's rows are kept in the base's own type.
        squares = layer.lora_squares.double() + dense.square().sum(dim=1) - weight.square().sum(dim=1)
        dense *= (state[f"{name}.lora_magnitude"].double() / squares.sqrt())[:, None]
    assert torch.allclose(merged[f"{name}.weight"].double(), dense, rtol=1.1 * torch.finfo(half).eps / 2, atol=1e-6)


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {}], ids=["dora", "pissa", "plain"])
def test_merging_under_autocast_is_merging_without(options: dict[str, Any]) -> None:
    adaptation = attach(toy_sam("vit"), MethodConfig(name="lora", rank=2, targets=["q", "mlp"], **options), 0)
    draw = generator(1)
    adaptation.load({k: v + 0.1 * torch.randn(v.shape, generator=draw) for k, v in adaptation.state().items()})
    expected = adaptation.merge()
    with torch.autocast("cpu", torch.bfloat16):
        found = adaptation.merge()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
