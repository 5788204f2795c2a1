"""How well a SAM outlines shapes it was not trained on, by kind of prompt."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medsam_lora.datasets.scenes import make_scene
from medsam_lora.datasets.shapes import make_sample
from medsam_lora.models.sam import SamModel
from medsam_lora.training.losses import hard_iou
from medsam_lora.training.scene_batch import normalised, points_in

HELD_OUT_SEED = 990_001
"""Of the shapes and scenes that scores are of; a recipe may not have it."""

_AT_ONCE = 16


@torch.no_grad()
def shape_iou(sam: SamModel, count: int, seed: int = HELD_OUT_SEED) -> Tensor:
    """IoU of single shapes from their exact box, at the model's own size, on the pixels of the picture.

    Parameters
    ----------
    sam : SamModel
    count : int
    seed : int

    Returns
    -------
    Tensor of float32, shape (count,)
    """
    found = []
    for first in range(0, count, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, count))
        samples = [make_sample(np.random.default_rng([seed, i]), sam.image_size) for i in numbers]
        boxes = np.stack([sample.box for sample in samples])[:, [1, 0, 3, 2]]
        images = torch.from_numpy(np.stack([sample.image[:1] for sample in samples]))
        masks = torch.from_numpy(np.stack([sample.mask[None] for sample in samples]))
        device = sam.pixel_mean.device
        logits, _ = sam(normalised(images).to(device), torch.from_numpy(boxes).to(device))
        found.append(_iou(logits[:, :1], masks.to(device))[:, 0])
    return torch.cat(found).cpu()


@torch.no_grad()
def scene_iou(sam: SamModel, count: int, seed: int = HELD_OUT_SEED) -> dict[str, float]:
    """Mean IoU over the objects of scenes, by prompt.

    Parameters
    ----------
    sam : SamModel
    count : int
        Scenes.
    seed : int

    Returns
    -------
    dict of str to float
        ``box``, ``box_floor`` (the filled box), ``point`` (one point; of the three masks for an ambiguous prompt the
        one that the decoder trusts most), ``point_best`` (the best of the three), ``none`` (against everything that
        was painted).
    """
    sums: dict[str, list[float]] = {name: [] for name in ("box", "box_floor", "point", "point_best", "none")}
    device, size = sam.pixel_mean.device, sam.image_size
    for number in range(count):
        generator = np.random.default_rng([seed, 1, number])
        scene = make_scene(generator, size)
        embedding = sam.encode(normalised(torch.from_numpy(scene.image)[None, None]).to(device))
        masks = torch.from_numpy(scene.masks[:, None]).to(device)
        counts = [len(masks)]
        boxes = torch.stack([_xyxy(mask) for mask in masks[:, 0]])
        sums["box"] += _iou(sam.decode(embedding, boxes, counts)[0][:, :1], masks)[:, 0].tolist()
        filled = torch.zeros_like(masks)
        for mask, (x0, y0, x1, y1) in zip(filled, boxes.int().tolist(), strict=True):
            mask[:, y0:y1, x0:x1] = True
        sums["box_floor"] += hard_iou(filled.float() - 0.5, masks.float())[:, 0].tolist()
        points = torch.from_numpy(np.stack([points_in(generator, mask, 1) for mask in scene.masks])).to(device)
        inside = torch.ones(points.shape[:2], device=device)
        logits, trust = sam.decode(embedding, None, counts, points=(points, inside))
        three = _iou(logits[:, 1:], masks)
        sums["point"] += three.gather(1, trust[:, 1:].argmax(dim=1, keepdim=True))[:, 0].tolist()
        sums["point_best"] += three.max(dim=1).values.tolist()
        painted = torch.from_numpy(scene.painted[None, None]).to(device)
        sums["none"] += _iou(sam.decode(embedding, None)[0][:, :1], painted)[:, 0].tolist()
    return {name: float(np.mean(values)) for name, values in sums.items()}


def _iou(logits: Tensor, masks: Tensor) -> Tensor:
    logits = F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
    return hard_iou(logits, masks.expand(-1, logits.shape[1], -1, -1).float())


def _xyxy(mask: Tensor) -> Tensor:
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
