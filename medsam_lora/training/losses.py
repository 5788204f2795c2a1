"""The training loss: Dice and cross-entropy on fused logits, with an optional focal share.

    loss = dice_weight * Dice + bce_weight * ((1 - focal_share) * BCE + focal_share * focal) + iou_weight * IoU error

The focal mixture is that of SAM-PARSER (arXiv 2308.14604). Every term is returned beside the sum, because a falling
sum alone hid a collapsing Dice before: cross-entropy falls to 0.05 on small tumours by predicting background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms.

    Parameters
    ----------
    dice, bce : float
    focal_share : float
        lambda in [0, 1] of (1 - lambda) BCE + lambda focal.
    focal_gamma : float
        Focusing exponent.
    auxiliary : float
        Weight of the mask tokens that are not the prediction; they keep the whole decoder supervised.
    iou : float
        Weight of the squared error of the decoder's own IoU estimate.
    """

    dice: float = 1.0
    bce: float = 1.0
    focal_share: float = 0.0
    focal_gamma: float = 2.0
    auxiliary: float = 0.1
    iou: float = 0.05


@dataclass(frozen=True)
class LossTerms:
    """The sum, and its terms before weighting (0-d tensors)."""

    total: Tensor
    dice: Tensor
    bce: Tensor
    focal: Tensor
    iou: Tensor


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss, one value per image and channel.

    Parameters
    ----------
    logits : Tensor of float, shape (B, R, X, Y)
    target : Tensor of float in {0, 1}, shape (B, R, X, Y)

    Returns
    -------
    Tensor, shape (B, R)
        1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), p = sigmoid(logits). The 1 (Laplace smoothing, in voxels) makes
        a correct empty prediction cost nothing and keeps the gradient finite there.

    Examples
    --------
    >>> one = torch.tensor([[[[40.0, -40.0]]]])
    >>> round(dice_loss(one, torch.tensor([[[[1.0, 1.0]]]])).item(), 4)  # 1 - (2 + 1) / (1 + 2 + 1)
    0.25
    """
    p = torch.sigmoid(logits)
    overlap = (p * target).sum(dim=(-2, -1))
    total = p.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over the pixels of each image and channel, shape (B, R)."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=(-2, -1))


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss without class weights, the mean over the pixels of each image and channel, shape (B, R).

    (1 - p_t)^gamma times the cross-entropy, p_t the probability of the true class (Lin et al., arXiv 1708.02002).

    Examples
    --------
    >>> z = torch.zeros(1, 1, 1, 1)
    >>> round(focal_loss(z, torch.ones(1, 1, 1, 1)).item(), 6)  # 0.5^2 * ln 2
    0.173287
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    # 1 - p_t from the logits themselves: exact also where p_t rounds to 1.
    miss = torch.sigmoid(torch.where(target > 0.5, -logits, logits))
    return (miss**gamma * cross_entropy).mean(dim=(-2, -1))


def hard_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of the thresholded logits and the target, shape (B, R); both empty is 1."""
    prediction, reference = logits > 0, target > 0.5
    overlap = (prediction & reference).sum(dim=(-2, -1)).float()
    union = (prediction | reference).sum(dim=(-2, -1)).float()
    return torch.where(union > 0, overlap / union.clamp(min=1), torch.ones_like(union))


def segmentation_loss(logits: Tensor, iou: Tensor, target: Tensor, main: list[int], weights: LossWeights) -> LossTerms:
    """The loss of a batch of fused mask tokens.

    Parameters
    ----------
    logits : Tensor of float, shape (B, T, X, Y)
        One channel per mask token of the decoder.
    iou : Tensor of float, shape (B, T)
        The decoder's estimate of each token's IoU.
    target : Tensor of bool or float, shape (B, T, X, Y)
    main : list of int
        The tokens that make the prediction; the others are auxiliary.
    weights : LossWeights

    Returns
    -------
    LossTerms
        `dice`, `bce`, `focal` are of the main tokens alone, so that they say what the prediction is worth.
    """
    logits = logits.float()  # under autocast the sums over a whole slice would overflow or lose digits
    target = target.to(logits.dtype)
    terms = torch.stack(
        [dice_loss(logits, target), bce_loss(logits, target), focal_loss(logits, target, weights.focal_gamma)]
    ).mean(dim=1)
    share = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    others = [t for t in range(logits.shape[1]) if t not in main]
    share[main] = 1 / len(main)
    dice, bce, focal = (terms[:, main].mean(dim=1)).unbind()
    if others:
        share[others] = weights.auxiliary / len(others)
    cross_entropy = (1 - weights.focal_share) * terms[1] + weights.focal_share * terms[2]
    masks = ((weights.dice * terms[0] + weights.bce * cross_entropy) * share).sum()
    error = F.mse_loss(iou.float(), hard_iou(logits.detach(), target))
    return LossTerms(masks + weights.iou * error, dice, bce, focal, error)
