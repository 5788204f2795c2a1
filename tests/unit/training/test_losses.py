"""Loss terms against values by hand and against MONAI."""

from __future__ import annotations

import math

import pytest
import torch
from monai.losses import DiceLoss

from medsam_lora.training.losses import (
    LossWeights,
    bce_loss,
    dice_loss,
    focal_loss,
    hard_iou,
    segmentation_loss,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_dice_loss_by_hand() -> None:
    # p = (0.8, 0.4), g = (1, 0): overlap 0.8, sums 1.2 + 1 -> 1 - (1.6 + 1) / (2.2 + 1) = 0.1875
    logits = torch.tensor([[[[logit(0.8), logit(0.4)]]]])
    target = torch.tensor([[[[1.0, 0.0]]]])
    assert dice_loss(logits, target).item() == pytest.approx(0.1875, abs=1e-6)


def test_dice_loss_equals_monai_with_the_same_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 9, 7, generator=generator)
    target = (torch.rand(3, 2, 9, 7, generator=generator) > 0.7).float()
    theirs = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")(logits, target).flatten(1)
    torch.testing.assert_close(dice_loss(logits, target), theirs)


def test_a_correct_empty_prediction_costs_nothing_and_a_wrong_one_has_a_gradient() -> None:
    empty = torch.zeros(1, 1, 4, 4)
    assert dice_loss(torch.full((1, 1, 4, 4), -40.0), empty).item() == pytest.approx(0.0, abs=1e-6)
    wrong = torch.zeros(1, 1, 4, 4, requires_grad=True)
    dice_loss(wrong, empty).sum().backward()
    assert wrong.grad is not None and (wrong.grad > 0).all()


def test_bce_by_hand() -> None:
    # -(ln 0.8 + ln 0.6) / 2
    logits = torch.tensor([[[[logit(0.8), logit(0.4)]]]])
    expected = -(math.log(0.8) + math.log(0.6)) / 2
    assert bce_loss(logits, torch.tensor([[[[1.0, 0.0]]]])).item() == pytest.approx(expected, abs=1e-6)


def test_focal_by_hand_and_its_limits() -> None:
    logits = torch.tensor([[[[logit(0.8), logit(0.4)]]]])
    target = torch.tensor([[[[1.0, 0.0]]]])
    # (0.2^2 * -ln 0.8 + 0.4^2 * -ln 0.6) / 2
    expected = (0.04 * -math.log(0.8) + 0.16 * -math.log(0.6)) / 2
    assert focal_loss(logits, target, 2.0).item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(focal_loss(logits, target, 0.0), bce_loss(logits, target))


def test_hard_iou() -> None:
    logits = torch.tensor([[[[1.0, 1.0, -1.0]], [[-1.0, -1.0, -1.0]]]])
    target = torch.tensor([[[[1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]]])
    assert hard_iou(logits, target).tolist() == [[pytest.approx(1 / 3), 1.0]]


def test_the_sum_is_the_weighted_terms() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 6, 6, generator=generator)
    target = (torch.rand(2, 1, 6, 6, generator=generator) > 0.5).float().expand(-1, 4, -1, -1)
    iou = torch.rand(2, 4, generator=generator)
    weights = LossWeights(dice=0.7, bce=0.3, focal_share=0.25, focal_gamma=2.0, auxiliary=0.0, iou=0.1)
    terms = segmentation_loss(logits, iou, target, [0], weights)
    expected = 0.7 * terms.dice + 0.3 * (0.75 * terms.bce + 0.25 * terms.focal) + 0.1 * terms.iou
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.dice, dice_loss(logits, target)[:, 0].mean())


def test_auxiliary_tokens_receive_gradient_but_do_not_count_as_the_prediction() -> None:
    logits = torch.zeros(1, 4, 5, 5, requires_grad=True)
    iou = torch.full((1, 4), 0.5, requires_grad=True)
    target = torch.ones(1, 4, 5, 5)
    terms = segmentation_loss(logits, iou, target, [0], LossWeights())
    terms.total.backward()
    assert logits.grad is not None and iou.grad is not None
    assert (logits.grad[:, 1:].abs() > 0).all() and (iou.grad.abs() > 0).all()
    assert logits.grad[:, 0].abs().sum() > 5 * logits.grad[:, 1].abs().sum()


def test_all_background_has_a_low_cross_entropy_and_a_high_dice_loss() -> None:
    """The thesis's trap: 2 % foreground, everything predicted as background."""
    target = torch.zeros(1, 1, 10, 10)
    target[..., 0, :2] = 1
    logits = torch.full_like(target, logit(0.02))
    assert bce_loss(logits, target).item() < 0.1
    assert dice_loss(logits, target).item() > 0.7
