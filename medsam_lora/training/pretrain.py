"""Pre-training a small SAM on synthetic promptable shapes that are not tumours."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from medsam_lora.datasets.shapes import make_sample
from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import SamModel
from medsam_lora.progress import track
from medsam_lora.training.losses import LossWeights, hard_iou, segmentation_loss


def pretrain(
    sam: SamModel,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    amp: str = "none",
    on_step: Callable[[int, float, float], None] | None = None,
) -> None:
    """Train all of a SAM, in place, to outline the object in a box.

    Parameters
    ----------
    sam : SamModel
    steps, batch_size : int
    lr : float
        Peak rate of AdamW: linear warm-up over a twentieth of the steps, then a half cosine to zero.
    seed : int
        Sample i of step s is a function of (seed, s, i).
    amp : str
        Autocast of the forward pass: ``none``, ``bf16`` or ``auto``.
    on_step : callable, optional
        Called with the step (from 1), the loss and the mean IoU of the batch.
    """
    device = next(sam.parameters()).device
    parameters = [p for p in sam.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    sam.train()
    for step in track(range(1, steps + 1), "shapes"):
        warm = max(1, steps // 20)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = lr * min(step / warm, cosine)
        pixels, boxes, masks = shape_batch(sam, seed, step, batch_size)
        with autocast(device, amp):
            logits, iou = sam(pixels.to(device), boxes.to(device), [1] * batch_size)
        # On the decoder grid: whole frames would cost more than the model.
        target = _to_grid(masks, logits.shape[-1]).to(device).expand(-1, logits.shape[1], -1, -1)
        terms = segmentation_loss(logits, iou, target, [0], LossWeights(auxiliary=0.5))
        optimiser.zero_grad(set_to_none=True)
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if on_step is not None:
            on_step(step, terms.total.item(), hard_iou(logits[:, :1].detach(), target[:, :1]).mean().item())
    sam.eval()


def shape_batch(sam: SamModel, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of synthetic shapes in the model frame.

    Returns
    -------
    pixels : Tensor of float32, shape (B, 3, S, S)
        Normalised as SAM's images are.
    boxes : Tensor of float32, shape (B, 4)
        XYXY, jittered by up to a tenth of the box's side.
    masks : Tensor of float32, shape (B, 1, S, S)
    """
    images, boxes, masks = [], [], []
    for i in range(batch_size):
        generator = np.random.default_rng([seed, step, i])
        sample = make_sample(generator, sam.image_size)
        i0, j0, i1, j1 = (float(v) for v in sample.box)
        slack = generator.uniform(-0.1, 0.1, 4) * [j1 - j0, i1 - i0, j1 - j0, i1 - i0]
        images.append(sample.image)
        boxes.append(np.clip(np.array([j0, i0, j1, i1]) + slack, 0, sam.image_size))
        masks.append(sample.mask[None])
    pixels = torch.from_numpy(np.stack(images)).float()
    pixels = (pixels - sam.pixel_mean.cpu()) / sam.pixel_std.cpu()
    return pixels, torch.from_numpy(np.stack(boxes)).float(), torch.from_numpy(np.stack(masks)).float()


def _to_grid(masks: Tensor, size: int) -> Tensor:
    # A decoder pixel is foreground where more than half of it is covered.
    return (torch.nn.functional.adaptive_avg_pool2d(masks, size) > 0.5).float()
