from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medsam_lora.errors import ConfigError
from medsam_lora.models.fusion import build_fusion

NAMES = ["t1n", "t1c", "t2f", "t2w"]


def fused(name: str, values: list[float], training: bool = False) -> float:
    fusion = build_fusion(name, NAMES[: len(values)]).train(training)
    return fusion(torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1, 1)).item()


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("mean_logit", [1.0, 2.0, 6.0, -1.0], 2.0),
        ("learned", [1.0, 2.0, 6.0, -1.0], 2.0),
        ("max", [1.0, 2.0, 6.0, -1.0], 6.0),
        # Probabilities 0.5 and 0.9: mean 0.7, whose odds are 7 / 3.
        ("mean_probability", [0.0, math.log(9)], math.log(7 / 3)),
        # Odds far apart: mean of 1 and almost 0 is 1 / 2, odds 1. The mean logit would be -20.
        ("mean_probability", [60.0, -100.0], 0.0),
        ("vote", [5.0, -1.0, -2.0], -1.0),  # two of three against
        ("vote", [0.5, 9.0, -50.0, 1.0], 0.75),  # three of four for, though the mean logit is negative
        ("vote", [-1.0, -2.0, -3.0, 99.0], -1.5),  # three of four against, though the mean logit is positive
        ("vote", [4.0, -1.0, -2.0, 2.0], 2.0),  # a tie; mean 0.75
        ("vote", [1.0, -1.0, -5.0, 2.0], -1.0),  # a tie; mean -0.75
        ("vote", [1.0, -1.0], -1.0),  # a tie with mean 0: not above 0, so not tumour
        ("vote", [0.0, 0.0, 3.0], 0.0),  # a logit of 0 is no vote for
    ],
)
def test_by_hand(name: str, values: list[float], expected: float) -> None:
    assert fused(name, values) == pytest.approx(expected, abs=1e-9)


def test_vote_against_counting() -> None:
    x = torch.randn(5, 4, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    for n_modalities in (1, 2, 3, 4):
        part = x[:, :n_modalities]
        votes = (part > 0).sum(dim=1)
        expected = torch.where(2 * votes == n_modalities, part.mean(dim=1) > 0, 2 * votes > n_modalities)
        mask = build_fusion("vote", NAMES[:n_modalities]).eval()(part) > 0
        assert torch.equal(mask, expected)


def test_vote_in_training_is_the_mean_probability() -> None:
    values = [0.5, 9.0, -50.0, 1.0]
    assert fused("vote", values, training=True) == fused("mean_probability", values)
    assert fused("vote", values) != fused("mean_probability", values)


def test_mean_probability_against_the_formula_in_float64() -> None:
    x = 4 * torch.randn(3, 4, 1, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(build_fusion("mean_probability", NAMES)(x), x.sigmoid().mean(dim=1).logit(), atol=1e-9)


def test_mean_probability_in_float32_where_the_formula_would_be_infinite() -> None:
    x = torch.full((1, 2, 1, 1, 1), 40.0)
    assert x.sigmoid().mean(dim=1).logit().isinf().all()
    assert build_fusion("mean_probability", NAMES[:2])(x).item() == pytest.approx(40.0)


def learned(weights: list[float]) -> torch.nn.Module:
    fusion = build_fusion("learned", NAMES)
    fusion.load_state_dict({"modality_weights": torch.tensor(weights)})
    return fusion


def test_learned_weights_by_hand() -> None:
    fusion = learned([0.0, math.log(3), -50.0, 2.0])
    x = torch.tensor([8.0, 4.0, 7.0, -6.0]).reshape(1, 4, 1, 1, 1)

    def of(*present: int) -> float:
        return fusion(x[:, list(present)], present).item()

    # Weights 1 and 3 of the two present: 1/4 and 3/4, whatever the absent ones weigh, in either order.
    assert of(0, 1) == pytest.approx(5.0)
    assert of(1, 0) == pytest.approx(5.0)
    assert of(0, 2) == pytest.approx(8.0)
    assert of(2) == pytest.approx(7.0)


def test_learned_weights_learn_from_the_modalities_present_only() -> None:
    fusion = build_fusion("learned", NAMES)
    x = torch.tensor([3.0, -1.0]).reshape(1, 2, 1, 1, 1)
    fusion(x, [0, 3]).sum().backward()
    # d/dw_i of sum softmax(w) x = p_i (x_i - mean) with p = 1/2 and mean 1: (1, -1).
    gradient = fusion.modality_weights.grad
    assert isinstance(gradient, Tensor)
    assert gradient.tolist() == [1.0, 0.0, 0.0, -1.0]


def test_only_the_learned_fusion_has_anything_to_save() -> None:
    sizes = {n: sum(p.numel() for p in build_fusion(n, NAMES).parameters()) for n in ("mean_logit", "vote", "learned")}
    assert sizes == {"mean_logit": 0, "vote": 0, "learned": 4}
    assert list(build_fusion("learned", NAMES).state_dict()) == ["modality_weights"]


def test_an_unknown_fusion_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown fusion 'mean_logits'; did you mean mean_logit\?"):
        build_fusion("mean_logits", NAMES)
    with pytest.raises(ConfigError, match="no modality"):
        build_fusion("max", [])
