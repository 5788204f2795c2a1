"""Whether the loss measures what is scored: on predictions of known Dice, from perfect down to the background alone."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from medsam_lora.doctor.result import Result, fault, ok, skipped
from medsam_lora.doctor.subject import Subject, tumour_of
from medsam_lora.models.segmenter import N_TOKENS
from medsam_lora.training import loop
from medsam_lora.training.losses import LossTerms, LossWeights

SURE = 8.0
"""Logit of a prediction without doubt."""
KEPT = (1.0, 0.75, 0.5, 0.25)
"""Shares of the tumour's rows that the predictions of the ladder keep."""
DICE_SHARE = 0.3
"""Least share of the fall of the loss, from background to perfect, that must be the Dice term's. With equal weights it
is 0.8 to 0.95; with cross-entropy alone, 0."""


def check(subject: Subject) -> Result:
    """The training's own loss on a ladder of predictions; it must fall as Dice rises, and by Dice above all."""
    if not subject.segmenter.trainable_groups():
        return skipped(f"{subject.config.method.name} trains nothing")
    trainer = subject.trainer(subject.segmenter, epochs=1)
    main = subject.segmenter.main_tokens
    case = min(subject.slices, key=lambda s: int(tumour_of(s).sum()))  # where background is most tempting
    tumour = torch.from_numpy(tumour_of(case))
    target = tumour[None, None].expand(1, N_TOKENS, -1, -1)

    def terms(logits: Tensor) -> LossTerms:
        given = logits[None, None].expand(1, N_TOKENS, -1, -1)
        return loop.segmentation_loss(given, torch.ones(1, N_TOKENS), target, main, trainer.weights)

    ladder = [_kept(tumour, share) for share in KEPT]
    losses = [terms(_logits(mask)) for mask in ladder]
    share = float(tumour.float().mean())
    # The best that a prediction without any skill can do in cross-entropy: the same small probability everywhere.
    blank = torch.full(tumour.shape, math.log(share / (1 - share)))
    background = terms(blank)
    totals = [float(t.total) for t in losses] + [float(background.total)]
    dices = [_dice(mask, tumour) for mask in ladder] + [0.0]
    wrong = blank.clone().requires_grad_()
    total = terms(wrong).total
    gradient = torch.autograd.grad(total, wrong, allow_unused=True)[0] if total.requires_grad else None
    slope = 0.0 if gradient is None else float(gradient.abs().sum())
    fall = totals[-1] - totals[0]
    weights = trainer.weights
    entropy = [_cross_entropy(t, weights) for t in (background, losses[0])]
    by_dice = 1 - weights.bce * (entropy[0] - entropy[1]) / fall if fall > 0 else 0.0
    measured = (
        "loss "
        + ", ".join(f"{value:.3f} at Dice {dice:.2f}" for value, dice in zip(totals, dices, strict=True))
        + f" (background alone, where {share:.1%} is tumour); {by_dice:.0%} of the fall is the Dice term's"
    )
    numbers = {"losses": totals, "dices": dices, "tumour_share": share, "dice_share": by_dice, "gradient": slope}
    if not slope > 0:
        return fault(
            measured,
            "The loss does not depend on the prediction (its gradient is zero): it is constant, or computed from "
            "thresholded masks.",
            "Compute the loss from logits, with autograd.",
            **numbers,
        )
    if weights.bce > 0 and not float(background.bce) > 0.1 * share:
        return fault(
            measured,
            "The cross-entropy term is 0 whatever is predicted: a softmax over a single channel is always 1.",
            "Use binary cross-entropy on logits.",
            **numbers,
        )
    if fall > 0 and by_dice < DICE_SHARE:
        return fault(
            measured,
            "The loss is dominated by cross-entropy: predicting background alone already has a low loss, so the loss "
            "falls while the Dice collapses.",
            "Raise train.dice_weight to that of train.bce_weight, and choose epochs by validation Dice.",
            **numbers,
        )
    if any(better >= worse for better, worse in pairwise(totals)):
        return fault(
            measured,
            "The loss does not rise as Dice falls: it measures something else than what is scored.",
            "Use the Dice and cross-entropy of training.losses, on logits.",
            **numbers,
        )
    return ok(measured, **numbers)


def _kept(tumour: Tensor, share: float) -> Tensor:
    """The first rows of a mask, up to a share of its voxels."""
    upto = tumour.flatten().cumsum(0).reshape(tumour.shape) <= max(1, round(share * int(tumour.sum())))
    return tumour & upto


def _logits(mask: Tensor) -> Tensor:
    return SURE * (2 * mask.float() - 1)


def _dice(mask: Tensor, reference: Tensor) -> float:
    return float(2 * (mask & reference).sum() / (mask.sum() + reference.sum()))


def _cross_entropy(terms: LossTerms, weights: LossWeights) -> float:
    return (1 - weights.focal_share) * float(terms.bce) + weights.focal_share * float(terms.focal)
