"""What every method promises, over the whole table of methods and both kinds of encoder."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_sam import ENCODERS, PROMPT_DIM, predict, toy_batch, toy_loss, toy_sam, train_steps

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError
from medsam_lora.models.checkpoint import REQUIRED_METADATA, load_adapter, save_adapter
from medsam_lora.peft import METHODS, attach, method_spec
from medsam_lora.peft.contract import Adaptation, attached_to, swap

VARIANTS = [
    MethodConfig(name="lora", rank=3, alpha=6.0, targets=["q", "k", "v", "proj", "mlp"]),
    MethodConfig(name="lora", rank=2, alpha=1.0, targets=["k", "mlp"], blocks=[-1], decoder="frozen"),
]
# On SAM's own encoder alone, to keep the suite quick; TinyViT's layouts are in tests/unit/peft.
VIT_VARIANTS = [
    MethodConfig(name="lora", rank=2, targets=["q", "v", "mlp"], dora=True, decoder="lora", scaling="alpha/sqrt(r)"),
    MethodConfig(name="lora", rank=2, targets=["k", "v", "proj"], init="pissa", scaling="none", decoder="lora"),
    MethodConfig(name="lora", rank=2, blocks="last 1", lora_plus=4.0),
    MethodConfig(name="sam_parser", layers=["neck", "patch", "linears"], bases=True, decoder="frozen"),
    MethodConfig(name="adapter", bottleneck=5, blocks="global", decoder="lora", rank=1),
    MethodConfig(name="prefix", tokens=3, blocks=[1], decoder="frozen"),
    MethodConfig(name="prompt_tokens", tokens=4),
    MethodConfig(name="sam_parser+lora", rank=2),
    MethodConfig(name="bitfit+lora+prefix", rank=2, tokens=2),
    MethodConfig(name="sd_trans", depth=3, bottleneck=4, decoder="frozen"),
]
CONFIGS = [MethodConfig(name=name) for name in METHODS] + VARIANTS
CASES = [pytest.param(e, c, id=f"{e}-{c.name}-{i}") for e in ENCODERS for i, c in enumerate(CONFIGS)]
CASES += [pytest.param("vit", c, id=f"vit-{c.name}-variant{i}") for i, c in enumerate(VIT_VARIANTS)]
TRAINED = [case for case in CASES if case.values[1].name != "zero_shot"]
# Methods that draw their start.
DRAWS = {"lora", "adapter", "adaptformer", "prompt_generator", "prefix", "vpt_deep", "sd_trans"}

_BASES = {encoder: toy_sam(encoder) for encoder in ENCODERS}


def base_model(encoder: str) -> nn.Module:
    return copy.deepcopy(_BASES[encoder])


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    pixels, boxes, _ = toy_batch()
    logits, iou = predict(model, pixels, boxes)
    return torch.cat([logits.flatten(), iou.flatten()])


def trainable(adaptation: Adaptation) -> list[nn.Parameter]:
    return [p for group in adaptation.parameters_by_group().values() for p in group]


def trained(encoder: str, config: MethodConfig, seed: int = 0) -> tuple[nn.Module, Adaptation]:
    model = base_model(encoder)
    adaptation = attach(model, config, seed)
    if trainable(adaptation):
        train_steps(model, trainable(adaptation))
    return model, adaptation


def test_the_cases_cover_the_table() -> None:
    assert {config.name for config in CONFIGS} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_says_what_is_so(name: str) -> None:
    spec = METHODS[name]
    assert spec.name == name
    assert spec.summary and spec.source
    assert set(spec.options) <= set(MethodConfig.model_fields) - {"name"}
    assert attach(base_model("vit"), MethodConfig(name=name), 0).report.mergeable is spec.mergeable


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_the_adapted_model_starts_as_the_base_model(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    before = outputs(model)
    attach(model, config, 0)
    # A method that does not start there says so in its entry, and is held to that as well.
    assert torch.equal(outputs(model), before) is method_spec(config.name).identity
    model.train()
    assert torch.equal(outputs(model), before) is method_spec(config.name).identity


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_declared_trainable_and_saved_names_are_one_list(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    adaptation = attach(model, config, 0)
    declared = [tensor.name for tensor in adaptation.report.tensors]
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(declared)
    assert list(adaptation.state()) == declared
    assert len(set(declared)) == len(declared)
    assert [tuple(parameters[t.name].shape) for t in adaptation.report.tensors] == [
        t.shape for t in adaptation.report.tensors
    ]
    grouped = {id(p) for p in trainable(adaptation)}
    assert grouped == {id(parameters[name]) for name in declared}
    assert set(adaptation.parameters_by_group()) == {tensor.group for tensor in adaptation.report.tensors}


@pytest.mark.parametrize(("encoder", "config"), TRAINED)
def test_training_moves_every_declared_tensor_and_no_other(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    adaptation = attach(model, config, 0)
    declared = set(adaptation.state())
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    largest = dict.fromkeys(declared, 0.0)
    optimiser = torch.optim.AdamW(trainable(adaptation), lr=1e-3)
    pixels, boxes, masks = toy_batch()
    for _ in range(2):  # LoRA's A has no gradient at the first step, where B is zero
        model.train()
        optimiser.zero_grad()
        toy_loss(*predict(model, pixels, boxes), masks).backward()
        for name, parameter in model.named_parameters():
            if name in declared:
                assert parameter.grad is not None, name
                largest[name] = max(largest[name], parameter.grad.abs().max().item())
        model.eval()
        optimiser.step()
    # A bias that is added to every key alike cancels in the softmax: its gradient is 0 but for rounding.
    cancelling = {name for name in declared if name.startswith("mask_decoder.") and name.endswith(".k_proj.bias")}
    assert [name for name in sorted(declared - cancelling) if largest[name] < 1e-9] == []
    assert all(largest[name] < 1e-6 for name in cancelling)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved - declared == set()
    assert declared - cancelling <= moved
    assert all(p.grad is None for name, p in model.named_parameters() if name not in declared)


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_the_count_is_that_of_the_closed_form(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    decoder = sum(p.numel() for p in model.mask_decoder.parameters())
    image_encoder = sum(p.numel() for p in model.image_encoder.parameters())
    shares = [encoder_count(encoder, image_encoder, c) for c in parts_of(config)]
    own_decoder = {"full": decoder, "frozen": 0, "lora": decoder_low_rank(config)}[config.decoder]
    if config.name == "prompt_tokens":
        own_decoder += (config.tokens or 2) * PROMPT_DIM
    expected = {"zero_shot": 0, "decoder_only": decoder, "full": image_encoder + decoder}
    assert attach(model, config, 0).report.count == expected.get(config.name, sum(shares) + own_decoder)


def parts_of(config: MethodConfig) -> list[MethodConfig]:
    return [config.model_copy(update={"name": name}) for name in config.name.split("+")]


def encoder_count(encoder: str, n_parameters: int, config: MethodConfig) -> int:
    """Trainable parameters in the image encoder, from the architecture alone."""
    # (width, hidden width, heads) of every block; TinyViT-5M has stages of 2, 6 and 2 blocks with attention.
    tiny = [(128, 512, 4)] * 2 + [(160, 640, 5)] * 6 + [(320, 1280, 10)] * 2
    blocks = [(32, 128, 2)] * 2 if encoder == "vit" else tiny
    vit = encoder == "vit"
    # The toy ViT's second and last block has global attention.
    named = {"global": [1], "last 1": [-1], None: range(len(blocks))}
    indices = config.blocks if isinstance(config.blocks, list) else named[config.blocks]
    chosen = [blocks[i] for i in indices]
    r, extra = config.rank, 1 if config.dora else 0
    name = config.name
    if name == "lora":
        total = 0
        for w, h, _ in chosen:
            for target in config.targets:
                total += r * (2 * (w + h) if target == "mlp" else 2 * w) + extra * (h + w if target == "mlp" else w)
        return total
    if name in ("adapter", "adaptformer"):
        m = config.bottleneck or 64
        return sum((2 * w * m + m + w) * (2 if name == "adapter" else 1) for w, _, _ in chosen)
    if name == "prompt_generator":
        # m = w / 4: 1x1 down, LayerNorm, 3x3 depthwise, LayerNorm, 1x1 up, LayerNorm.
        return sum(
            w * m + m + 2 * m + 9 * m + 2 * m + m * w + w + 2 * w for w in (w for w, _, _ in chosen) for m in [w // 4]
        )
    if name == "sd_trans":  # two bottlenecks, with stacks a third one; of a quarter of the width
        n = 3 if config.depth > 1 else 2
        return sum(n * (2 * w * m + m + w) for w, _, _ in chosen for m in [config.bottleneck or w // 4])
    if name == "prefix":
        p = config.tokens or 10
        return sum(2 * p * w + heads for w, _, heads in chosen)
    if name == "vpt_deep":
        return sum((config.tokens or 10) * w for w, _, _ in chosen)
    if name == "sam_parser":
        # (output features, input features) of each matrix.
        last = blocks[-1][0]
        shapes = [(PROMPT_DIM, last), (PROMPT_DIM, 9 * PROMPT_DIM)]
        if "patch" in config.layers:
            shapes += [(32, 3 * 16 * 16)] if vit else [(32, 27), (64, 32 * 9)]
        if "linears" in config.layers:
            shapes += [shape for w, h, _ in chosen for shape in ((3 * w, w), (w, w), (h, w), (w, h))]
        return sum(min(s) * (1 + (sum(s) if config.bases else 0)) for s in shapes)
    if name == "layernorm":
        return sum(4 * w for w, _, _ in blocks) + 4 * PROMPT_DIM
    if name == "bitfit":
        # Two norms, qkv, proj, fc1, fc2; the neck's norms.
        own = sum(2 * w + 3 * w + w + h + w for w, h, _ in blocks) + 2 * PROMPT_DIM
        if vit:
            return own + 32  # patch embedding
        # BatchNorms: patch embedding 32 + 64; two inverted bottlenecks (256, 256, 64); mergings 3 x (128, 160, 320);
        # local convolutions of the blocks.
        return own + 96 + 2 * (256 + 256 + 64) + 3 * (128 + 160 + 320) + sum(w for w, _, _ in blocks)
    return n_parameters if name == "full" else 0


def decoder_low_rank(config: MethodConfig) -> int:
    """Parameters of low-rank branches in the toy decoder: two layers of width 32, cross attention at 16, hidden 64."""
    w, inner, hidden, r, extra = PROMPT_DIM, PROMPT_DIM // 2, 64, config.rank, 1 if config.dora else 0
    total = 0
    for target in config.targets:
        if target == "mlp":
            total += 2 * (2 * r * (w + hidden) + extra * (w + hidden))
        else:
            out = w if target == "proj" else inner
            total += 2 * (2 * r * w + extra * w) + 5 * (r * (w + inner) + extra * out)
    return total


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_an_adapter_file_gives_the_same_bits_back(encoder: str, config: MethodConfig, tmp_path: Path) -> None:
    model, adaptation = trained(encoder, config)
    after = outputs(model)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adaptation.state(), dict.fromkeys(REQUIRED_METADATA, "x"))
    fresh = base_model(encoder)
    other = attach(fresh, config, seed=1)
    assert config.name == "zero_shot" or not torch.equal(outputs(fresh), after)
    tensors, _ = load_adapter(path)
    other.load(tensors)
    assert torch.equal(outputs(fresh), after)


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_loading_is_strict_and_leaves_all_as_it_was(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    adaptation = attach(model, config, 0)
    before = adaptation.state()
    good = {name: tensor + 1 for name, tensor in before.items()}
    bad = {"unexpected image_encoder.other": {**good, "image_encoder.other": torch.zeros(1)}}
    if good:
        name = list(good)[-1]
        bad[f"missing {name}"] = {k: v for k, v in good.items() if k != name}
        bad[f"{name} is {tuple(torch.cat([good[name]] * 2).shape)}"] = {**good, name: torch.cat([good[name]] * 2)}
        bad[f"{name} is {tuple(good[name].shape)} torch.float16"] = {**good, name: good[name].half()}
    for words, state in bad.items():
        with pytest.raises(AdapterError) as error:
            adaptation.load(state)
        assert words in str(error.value)
        assert "Remedy" in str(error.value)
        assert all(torch.equal(tensor, before[n]) for n, tensor in adaptation.state().items())


@pytest.mark.parametrize(("encoder", "config"), TRAINED)
def test_an_optimiser_made_before_loading_trains_what_the_model_uses(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    adaptation = attach(model, config, 0)
    optimiser = torch.optim.SGD(trainable(adaptation), lr=0.1)
    adaptation.load({name: tensor + 0.01 for name, tensor in adaptation.state().items()})
    before = outputs(model)
    pixels, boxes, masks = toy_batch()
    toy_loss(*predict(model, pixels, boxes), masks).backward()
    optimiser.step()
    assert not torch.equal(outputs(model), before)


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_the_merged_model_is_a_stock_model_with_the_same_output(encoder: str, config: MethodConfig) -> None:
    base = base_model(encoder)
    model = base_model(encoder)
    adaptation = attach(model, config, 0)
    generator = torch.Generator().manual_seed(0)
    # Far from the start, so that a wrong merge could not pass for rounding.
    adaptation.load({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in adaptation.state().items()})
    if not adaptation.report.mergeable:
        with pytest.raises(AdapterError, match="cannot be merged"):
            adaptation.merge()
        return
    merged = adaptation.merge()
    assert list(merged) == list(base.state_dict())
    start = outputs(base)
    base.load_state_dict(merged)
    expected = outputs(model)
    assert torch.allclose(outputs(base), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert config.name == "zero_shot" or (start - expected).abs().max() > 1e-2 * expected.abs().max()
    assert adaptation.enabled
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_disabled_it_is_the_base_model_bit_for_bit(encoder: str, config: MethodConfig) -> None:
    base = outputs(base_model(encoder))
    model, adaptation = trained(encoder, config)
    after = outputs(model)
    with adaptation.disable():
        assert torch.equal(outputs(model), base)
        with adaptation.disable():
            assert torch.equal(outputs(model), base)
        assert not adaptation.enabled
        assert torch.equal(outputs(model), base)
    assert adaptation.enabled
    assert torch.equal(outputs(model), after)
    with pytest.raises(KeyError), adaptation.disable():
        raise KeyError
    assert torch.equal(outputs(model), after)


@pytest.mark.parametrize(("encoder", "config"), TRAINED)
def test_two_of_a_kind_are_swapped_on_one_base(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    base = outputs(model)
    kept = []
    for seed, steps in ((0, 2), (1, 3)):
        adaptation = attach(model, config, seed)
        train_steps(model, trainable(adaptation), steps)
        kept.append((adaptation, outputs(model), [p.data_ptr() for p in trainable(adaptation)]))
        adaptation.detach()
    assert not torch.equal(kept[0][1], kept[1][1])
    for n in (0, 1, 0):
        adaptation, expected, _ = kept[n]
        swap(model, adaptation)
        assert attached_to(model) is adaptation and torch.equal(outputs(model), expected)
    # Nothing was copied: what makes it a matter of milliseconds.
    assert all([p.data_ptr() for p in trainable(adaptation)] == places for adaptation, _, places in kept)
    swap(model, None)
    assert torch.equal(outputs(model), base)


@pytest.mark.parametrize(("encoder", "config"), CASES)
def test_detaching_gives_the_very_model_back(encoder: str, config: MethodConfig) -> None:
    model = base_model(encoder)
    model.prompt_encoder.requires_grad_(False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adaptation = attach(model, config, 0)
    if trainable(adaptation):
        train_steps(model, trainable(adaptation))
    after = outputs(model)
    adaptation.detach()
    assert attached_to(model) is None
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert list(model.state_dict()) == list(start)
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    # Another adapter takes its place, and gives it back.
    other = attach(model, MethodConfig(name="lora", rank=5), 7)
    with pytest.raises(AdapterError, match="attached to this model already"):
        adaptation.reattach()
    train_steps(model, trainable(other))
    other.detach()
    adaptation.reattach()
    assert torch.equal(outputs(model), after)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_attaching_leaves_the_global_random_states_alone(config: MethodConfig) -> None:
    model = base_model("vit")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    attach(model, config, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_the_seed_decides_the_start(config: MethodConfig) -> None:
    states = [attach(base_model("vit"), config, seed).state() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    different = any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert different is (config.name in DRAWS)


@pytest.mark.parametrize(("encoder", "config"), TRAINED)
def test_a_copy_of_the_model_is_independent(encoder: str, config: MethodConfig) -> None:
    model, adaptation = trained(encoder, config)
    after = outputs(model)
    clone = copy.deepcopy(model)
    copied = attached_to(clone)
    assert copied is not None and copied is not adaptation
    train_steps(clone, trainable(copied))
    assert not torch.equal(outputs(clone), after)
    assert torch.equal(outputs(model), after)
    base = outputs(base_model(encoder))
    with copied.disable():
        assert torch.equal(outputs(clone), base)
