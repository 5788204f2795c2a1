"""The table of methods: counts written out by hand, and multiply-accumulates against an independent count."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from medsam_lora.cli import main
from medsam_lora.config import MethodConfig
from medsam_lora.models.outline import encoder_macs, outline
from medsam_lora.models.tiny_vit import ConvNorm
from medsam_lora.peft import METHODS
from medsam_lora.stages.methods import as_text, methods

DECODER = 4_058_340


@pytest.fixture(scope="module")
def vit_b() -> list[dict[str, Any]]:
    return methods("vit_b")


def row(rows: list[dict[str, Any]], method: str, **options: Any) -> dict[str, Any]:
    """The first row of a method with these options, the others at their defaults."""
    wanted = MethodConfig(name=method, **options).model_dump(mode="json")
    return next(r for r in rows if r["method"] == method and all(wanted[k] == v for k, v in r["options"].items()))


def test_every_method_is_there_with_the_keys_that_are_promised(vit_b: list[dict[str, Any]]) -> None:
    assert {r["method"] for r in vit_b} >= set(METHODS)
    keys = {
        "method",
        "options",
        "encoder_parameters",
        "trainable_parameters",
        "gmac_per_image",
        "cache_point",
        "mergeable",
    }
    assert all(keys <= set(r) for r in vit_b)
    assert json.loads(json.dumps(vit_b)) == vit_b


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("zero_shot", {}, 0),
        ("decoder_only", {}, 0),
        ("full", {}, 89_670_912),
        ("lora", {}, 294_912),  # 12 blocks x (q, v) x (A, B) x 768 x 8
        ("lora", {"rank": 4}, 147_456),
        ("adapter", {}, 2_379_264),  # 24 x (2 x 768 x 64 + 64 + 768)
        ("adaptformer", {}, 1_189_632),
        ("prompt_generator", {}, 3_598_848),  # 12 x 299,904
        ("prefix", {}, 184_464),  # 12 x (2 x 10 x 768 + 12)
        ("vpt_deep", {}, 92_160),  # 12 x 10 x 768
        ("prompt_tokens", {}, 0),
        ("sd_trans", {"depth": 3}, 10_651_392),  # 12 x 3 x (2 x 768 x 192 + 192 + 768)
        ("sam_parser", {}, 512),
        ("sam_parser", {"layers": ["linears"]}, 36_864),  # 48 Linears of rank 768
        ("sam_parser", {"layers": ["neck", "linears"]}, 37_376),
        ("sam_parser", {"bases": True}, 917_504 + 512),
        ("bitfit", {}, 102_656),  # 12 x 11 x 768 + patch embedding 768 + neck 2 x 256
        ("layernorm", {}, 37_888),  # 12 x 4 x 768 + neck 4 x 256
        ("sam_parser+lora", {}, 512 + 294_912),
    ],
)
def test_parameters_in_the_encoder_of_vit_b(
    vit_b: list[dict[str, Any]], method: str, options: dict[str, Any], count: int
) -> None:
    found = row(vit_b, method, **options)
    assert found["encoder_parameters"] == count
    extra = {"zero_shot": 0, "prompt_tokens": DECODER + 512}.get(method, DECODER)
    assert found["trainable_parameters"] == count + extra


def test_the_small_decoder_of_samed(vit_b: list[dict[str, Any]]) -> None:
    found = row(vit_b, "lora", rank=4, decoder="lora")
    assert found["trainable_parameters"] == 147_456 + 23_552


def test_table_4_of_sam_parser_to_its_printed_digits(vit_b: list[dict[str, Any]]) -> None:
    papers = {(r["method"], r["paper"]["printed"]): r["paper"]["agrees"] for r in vit_b if r["paper"]}
    assert papers == {
        ("decoder_only", "3963.2"): True,
        ("lora", "+144"): True,
        ("prompt_generator", "+3514.5"): True,
        ("sam_parser", "+0.5"): True,
        ("sam_parser", "+889.2"): False,
    }
    text = as_text(vit_b, "vit_b")
    assert "4107.2" in text and "counted here 896.5" in text and "374.9" in text


def test_multiply_accumulates_of_vit_b_by_hand(vit_b: list[dict[str, Any]]) -> None:
    # Tokens: 4096; 25 windows of 196 = 4900 in the eight windowed blocks, for qkv and proj.
    linears = 8 * (4 * 768**2 * 4900 + 8 * 768**2 * 4096) + 4 * 12 * 768**2 * 4096
    # Scores and weighted values, 2 N^2 C each window; relative positions along both axes, 2 N side C.
    windowed, whole = 25 * (2 * 196**2 + 2 * 196 * 14) * 768, (2 * 4096**2 + 2 * 4096 * 64) * 768
    convolutions = 4096 * (768 * 768 + 768 * 256 + 256 * 256 * 9)
    base = linears + 8 * windowed + 4 * whole + convolutions
    assert row(vit_b, "zero_shot")["gmac_per_image"] == pytest.approx(base / 1e9, rel=1e-12)
    assert round(base / 1e9) == 486 and round((linears + convolutions) / 1e9, 1) == 368.7
    # LoRA of rank 4 on q and v: (A 768 x 4 + B 4 x 768) for each token of the windows, twice a block.
    extra = 2 * 2 * 768 * 4 * (8 * 4900 + 4 * 4096)
    assert row(vit_b, "lora", rank=4)["extra_gmac_per_image"] == pytest.approx(extra / 1e9, rel=1e-9)
    # Weights are put together once per batch.
    assert row(vit_b, "sam_parser", layers=["neck", "linears"])["extra_gmac_per_image"] == 0


@pytest.mark.parametrize("name", ["vit_nano", "vit_t"])
def test_other_models_against_a_count_of_their_layers(name: str) -> None:
    """Layers are counted by hooks; what remains is the attention, which has none and is counted by hand."""
    model = outline(name, 128)
    layers = 0

    def count(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        nonlocal layers
        # TinyViT folds a normalisation into a kernel, past the forward of the convolution itself.
        weight = module.c.weight if isinstance(module, ConvNorm) else module.weight
        layers += out.numel() * weight[0].numel()

    for module in model.image_encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | ConvNorm):
            module.register_forward_hook(count)
    attention = {
        # 16 x 16 cells, 192 features: four blocks of 4 windows of 8 x 8, two of one; relative positions on two axes.
        "vit_nano": (4 * 4 * (2 * 64**2 + 2 * 64 * 8) + 2 * (2 * 256**2 + 2 * 256 * 16)) * 192,
        # 16 x 16 cells in 9 windows of 49, 8 x 8 in one of 196, 8 x 8 in 4 of 49.
        "vit_t": 2 * 9 * 2 * 49**2 * 128 + 6 * 2 * 196**2 * 160 + 2 * 4 * 2 * 49**2 * 320,
    }
    macs = encoder_macs(model)
    # Hooks saw a batch of one and a batch of two.
    assert macs == layers // 3 + attention[name]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["methods", *words])
        assert not stop.value.code
        return capsys.readouterr().out

    (one,) = json.loads(run("--model", "vit_nano", "--json", "--set", "method.rank=16"))
    assert one["method"] == "lora" and one["options"]["rank"] == 16
    assert one["encoder_parameters"] == 6 * 2 * 2 * 192 * 16
    (named,) = json.loads(run("--json", "--set", "model.name=vit_nano", "--set", "method.rank=16"))
    assert named == one
    text = run("--model", "vit_nano")
    assert all(f"\n{name} " in text for name in METHODS)
    with pytest.raises(SystemExit) as stop:
        main(["methods", "--model", "vit_x"])
    assert stop.value.code == 2


def test_the_sources_of_a_combination_are_those_of_its_parts() -> None:
    text = as_text(methods("vit_nano", MethodConfig(name="sam_parser + lora")), "vit_nano")
    sources = text.partition("\nsources\n")[2].splitlines()
    assert [line.split(":")[0].strip() for line in sources] == ["lora", "sam_parser"]


def test_the_first_row_of_a_method_has_its_default_options(vit_b: list[dict[str, Any]]) -> None:
    first = {r["method"]: r for r in reversed(vit_b)}
    for name, found in first.items():
        defaults = MethodConfig(name=name).model_dump(mode="json")
        assert found["options"] == {option: defaults[option] for option in found["options"]}
    assert len(first) == len(METHODS) + 1 < len(vit_b)
