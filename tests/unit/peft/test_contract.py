from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toy_sam import predict, toy_batch, toy_sam

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft import attach
from medsam_lora.peft.contract import Adaptation, attached_to, swap
from medsam_lora.peft.edits import Edit, train_whole

CONFIG = MethodConfig(name="decoder_only")


class Gate(nn.Module):
    """A non-linear addition, which no weight of the base can express."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.gain * x.tanh()


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def gated(model: nn.Module) -> Adaptation:
    base = model.get_submodule("1")
    return Adaptation(model, CONFIG, [Edit("1", base, Gate(base), "encoder")], expected_count=1)


def test_an_edit_declares_only_what_is_new() -> None:
    adaptation = gated(small_model())
    assert [(t.name, t.shape, t.group) for t in adaptation.report.tensors] == [("1.gain", (1,), "encoder")]
    assert adaptation.report.count == 1


def test_what_cannot_be_merged_says_so() -> None:
    adaptation = gated(small_model())
    assert not adaptation.report.mergeable
    with pytest.raises(AdapterError, match="cannot be merged"):
        adaptation.merge()


def test_a_count_other_than_the_closed_form_is_refused() -> None:
    model = small_model()
    with pytest.raises(AdapterError, match="declares 6 parameters, its closed form gives 7"):
        Adaptation(model, CONFIG, train_whole(model, "0", "decoder"), expected_count=7)
    assert attached_to(model) is None
    assert all(p.requires_grad for p in model.parameters())


def test_a_declared_tensor_that_does_not_train_is_refused() -> None:
    model = small_model()
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    edit = Edit("0.bias", model.get_parameter("0.bias"), frozen, "decoder")
    with pytest.raises(AdapterError, match=r"declared and trainable tensors differ: \['0.bias'\]"):
        Adaptation(model, CONFIG, [edit], expected_count=2)
    assert attached_to(model) is None


def test_an_edit_of_something_else_is_refused() -> None:
    model, other = small_model(), small_model()
    with pytest.raises(AdapterError, match=r"0.weight is not what method decoder_only was made for"):
        Adaptation(model, CONFIG, train_whole(other, "0", "decoder"), expected_count=6)


def test_one_adaptation_at_a_time() -> None:
    model = small_model()
    first = gated(model)
    with pytest.raises(AdapterError, match=r"attached to this model already. Remedy: Detach"):
        Adaptation(model, CONFIG, train_whole(model, "0", "decoder"), expected_count=6)
    assert attached_to(model) is first
    with first.disable(), pytest.raises(AdapterError, match="disabled at the moment"):
        first.detach()
    first.detach()
    with pytest.raises(AdapterError, match="not attached"):
        first.detach()
    with first.disable():
        assert not first.enabled


def test_state_is_a_copy() -> None:
    model = small_model()
    adaptation = Adaptation(model, CONFIG, train_whole(model, "0", "decoder"), expected_count=6)
    state = adaptation.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for parameter in adaptation.parameters_by_group()["decoder"]:
            parameter.add_(1.0)
    assert all(torch.equal(state[name], before[name]) for name in before)
    with adaptation.disable():  # the adaptation's tensors, not the ones the model computes with at the moment
        assert torch.equal(adaptation.state()["0.bias"], before["0.bias"] + 1)


def test_a_mode_set_while_disabled_is_kept() -> None:
    model = small_model()
    adaptation = gated(model.train())
    with adaptation.disable():
        model.eval()
    assert not model.get_submodule("1").training
    model.train()
    adaptation.detach()
    assert model.get_submodule("1").training


def test_merging_while_disabled_or_detached_is_the_same() -> None:
    model = toy_sam("vit")
    adaptation = attach(model, MethodConfig(name="lora"), 0)
    adaptation.load({name: tensor + 0.1 for name, tensor in adaptation.state().items()})
    merged = [adaptation.merge()]
    with adaptation.disable():
        merged.append(adaptation.merge())
    adaptation.detach()
    merged.append(adaptation.merge())
    for other in merged[1:]:
        assert list(other) == list(merged[0])
        assert all(torch.equal(other[name], merged[0][name]) for name in other)


def test_long_lists_of_misfits_are_shortened() -> None:
    adaptation = attach(toy_sam("vit"), CONFIG, 0)
    with pytest.raises(AdapterError, match=r"and \d+ more\. Remedy"):
        adaptation.load({})


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'lorra'; did you mean lora\?"):
        attach(toy_sam("vit"), MethodConfig(name="lorra"), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["decoder_only", "lora", "full"])
def test_the_resting_tensors_follow_the_model_to_another_device(name: str) -> None:
    model = toy_sam("vit")
    pixels, boxes, _ = toy_batch()
    with torch.no_grad():
        base, _ = predict(model, pixels, boxes)
    adaptation = attach(model, MethodConfig(name=name), 0)
    parameters = [p for group in adaptation.parameters_by_group().values() for p in group]
    model.to("cuda")
    with torch.no_grad(), adaptation.disable():
        there, _ = predict(model, pixels.cuda(), boxes.cuda())
        assert torch.allclose(there.cpu(), base, atol=1e-4)
        model.to("cpu")
        assert torch.equal(predict(model, pixels, boxes)[0], base)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert [id(p) for group in adaptation.parameters_by_group().values() for p in group] == [id(p) for p in parameters]
    predict(model, pixels, boxes)[0].sum().backward()
    model.to("cuda")
    adaptation.detach()
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_a_swap_that_fails_changes_nothing() -> None:
    model = small_model()
    first = gated(model)
    first.detach()
    second = Adaptation(model, CONFIG, train_whole(model, "0", "decoder"), expected_count=6)
    # What the first one was made for is no longer there.
    model[1] = nn.Linear(2, 2).requires_grad_(False)
    enabled = model.get_parameter("0.weight")
    with pytest.raises(AdapterError, match="1 is not what method decoder_only was made for"):
        swap(model, first)
    assert attached_to(model) is second and second.enabled and not first.enabled
    assert model.get_parameter("0.weight") is enabled and enabled.requires_grad
    second.detach()
    assert all(p.requires_grad for p in model[0].parameters())
    assert not any(p.requires_grad for p in model[1].parameters())
