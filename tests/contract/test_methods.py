"""What every method promises, over the whole table of methods and both kinds of encoder."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_sam import ENCODERS, predict, toy_batch, toy_loss, toy_sam, train_steps

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError
from medsam_lora.models.checkpoint import REQUIRED_METADATA, load_adapter, save_adapter
from medsam_lora.peft import METHODS, attach
from medsam_lora.peft.contract import Adaptation, attached_to

VARIANTS = [
    MethodConfig(name="lora", rank=3, alpha=6.0, targets=["q", "k", "v", "proj", "mlp"]),
    MethodConfig(name="lora", rank=2, alpha=1.0, targets=["k", "mlp"], blocks=[-1], decoder="frozen"),
]
CONFIGS = [MethodConfig(name=name) for name in METHODS] + VARIANTS
CASES = [pytest.param(e, c, id=f"{e}-{c.name}-{i}") for e in ENCODERS for i, c in enumerate(CONFIGS)]
TRAINED = [case for case in CASES if case.values[1].name != "zero_shot"]

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
    assert torch.equal(outputs(model), before)
    model.train()
    assert torch.equal(outputs(model), before)


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
    # (width, hidden width) of every block; TinyViT-5M has stages of 2, 6 and 2 blocks with attention.
    blocks = [(32, 128)] * 2 if encoder == "vit" else [(128, 512)] * 2 + [(160, 640)] * 6 + [(320, 1280)] * 2
    chosen = blocks if config.blocks is None else [blocks[i] for i in config.blocks]
    per_target = {"q": 2, "k": 2, "v": 2, "proj": 2}
    low_rank = sum(
        config.rank * (2 * (width + hidden) if target == "mlp" else per_target[target] * width)
        for width, hidden in chosen
        for target in config.targets
    )
    expected = {
        "zero_shot": 0,
        "decoder_only": decoder,
        "full": image_encoder + decoder,
        "lora": low_rank + (decoder if config.decoder == "full" else 0),
    }
    assert attach(model, config, 0).report.count == expected[config.name]


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
    if config.name == "lora":
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


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
