"""What every fusion promises, over the whole table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medsam_lora.config import FusionConfig
from medsam_lora.labels import MODALITIES
from medsam_lora.models.fusion import FUSIONS, Fusion, build_fusion

MODES = [
    pytest.param(name, training, id=f"{name}-{'train' if training else 'eval'}")
    for name in FUSIONS
    for training in (False, True)
]


def logits(n_modalities: int = 4, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(2, n_modalities, 3, 5, 6, generator=torch.Generator().manual_seed(n_modalities))


def fusion(name: str, training: bool) -> Fusion:
    return build_fusion(name, MODALITIES).train(training)


def test_the_configuration_knows_the_table() -> None:
    assert set(FusionConfig.model_fields["name"].annotation.__args__) == set(FUSIONS)


@pytest.mark.parametrize(("name", "training"), MODES)
def test_the_order_of_equal_modalities_does_not_matter(name: str, training: bool) -> None:
    x = logits()
    fuse = fusion(name, training)
    assert torch.allclose(fuse(x[:, [2, 0, 3, 1]]), fuse(x), atol=1e-5)


@pytest.mark.parametrize(("name", "training"), MODES)
@pytest.mark.parametrize("index", range(4))
def test_a_subset_of_one_is_that_modality(name: str, training: bool, index: int) -> None:
    x = logits()[:, index : index + 1]
    assert torch.allclose(fusion(name, training)(x, [index]), x[:, 0], atol=1e-5)


@pytest.mark.parametrize(("name", "training"), MODES)
@pytest.mark.parametrize("present", [None, [0, 2], [3, 1, 0], [0, 1, 2, 3]])
def test_the_result_lies_between_the_modalities(name: str, training: bool, present: list[int] | None) -> None:
    x = logits(4 if present is None else len(present))
    y = fusion(name, training)(x, present)
    assert y.shape == (2, 3, 5, 6)
    assert (y >= x.amin(dim=1) - 1e-5).all()
    assert (y <= x.amax(dim=1) + 1e-5).all()


@pytest.mark.parametrize(("name", "training"), MODES)
def test_agreement_is_kept(name: str, training: bool) -> None:
    one = logits(1)
    assert torch.allclose(fusion(name, training)(one.expand(-1, 4, -1, -1, -1)), one[:, 0], atol=1e-5)


@pytest.mark.parametrize(("name", "training"), MODES)
def test_extreme_logits_stay_finite_with_their_gradients(name: str, training: bool) -> None:
    x = torch.tensor([-300.0, -90.0, 90.0, 300.0]).reshape(1, 4, 1, 1, 1).requires_grad_()
    y = fusion(name, training)(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", FUSIONS)
def test_in_training_the_result_depends_smoothly_on_its_modalities(name: str) -> None:
    x = logits().double().requires_grad_()
    fusion(name, True).double()(x).sum().backward()
    assert x.grad is not None
    reached = (x.grad != 0).sum(dim=1)
    # The maximum follows one modality at each pixel by its nature; every other fusion teaches them all.
    assert (reached == (1 if name == "max" else 4)).all()
    # A larger logit anywhere never lowers the result, and all of them raised by d raise it by d at most.
    assert (x.grad >= 0).all()
    assert (x.grad.sum(dim=1) <= 1 + 1e-9).all()


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize(
    ("channels", "present"), [(3, None), (2, [0, 1, 2]), (2, [1, 1]), (1, [4]), (1, [-1]), (0, [])]
)
def test_channels_that_are_not_those_present_are_refused(name: str, channels: int, present: list[int] | None) -> None:
    with pytest.raises(ValueError, match="modalities"):
        build_fusion(name, MODALITIES)(torch.zeros(1, channels, 1, 2, 2), present)


@pytest.mark.parametrize("name", FUSIONS)
def test_half_precision_stays_half_precision(name: str) -> None:
    x = logits().to(torch.bfloat16)
    assert fusion(name, True)(x).dtype == fusion(name, False)(x).dtype == torch.bfloat16
