"""Batches of synthetic scenes with prompts, for pre-training and for what is held out of it.

Sample i of step s is a function of (seed, s, i), so a run that was stopped goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medsam_lora.datasets.scenes import make_scene, shapes_scene
from medsam_lora.datasets.shapes import box_of
from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD

MOST_POINTS = 3

Points = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SceneBatch:
    """A batch in the model frame.

    Parameters
    ----------
    pixels : Tensor of float32, shape (B, 3, S, S)
        Normalised as SAM's images are.
    counts : list of B int
        Objects of each image.
    boxes : Tensor of float32, shape (N, 4)
        XYXY, more or less exact.
    points : tuple of Tensor, shapes (N, P, 2) and (N, P)
        XY of pixel corners and labels (1: inside) of points in each object.
    masks : Tensor of float32, shape (N, 1, S, S)
    painted : Tensor of float32, shape (B, 1, S, S)
    """

    pixels: Tensor
    counts: list[int]
    boxes: Tensor
    points: Points
    masks: Tensor
    painted: Tensor


def scene_batch(
    seed: int, step: int, numbers: Sequence[int], size: int, shapes: float = 0.0, shaken: float = 0.5
) -> SceneBatch:
    """The scenes of those numbers of one batch; each is a function of (seed, step, number).

    Parameters
    ----------
    seed, step : int
    numbers : sequence of int
        Of the batch's pictures, the ones to draw.
    size : int
        Side of the pictures.
    shapes : float
        Share of pictures that are of `datasets.shapes`.
    shaken : float
        Share of boxes whose edges are moved.
    """
    images, counts, boxes, points, masks, painted = [], [], [], [], [], []
    n_points = 1 + int(np.random.default_rng([seed, step]).integers(MOST_POINTS))
    for i in numbers:
        generator = np.random.default_rng([seed, step, i])
        scene = shapes_scene(generator, size) if shapes and generator.random() < shapes else make_scene(generator, size)
        images.append(scene.image)
        counts.append(len(scene.masks))
        masks.append(scene.masks)
        painted.append(scene.painted[None])
        boxes += [shaken_box(generator, mask, shaken) for mask in scene.masks]
        points += [points_in(generator, mask, n_points) for mask in scene.masks]
    grey = torch.from_numpy(np.stack(images))[:, None]
    places = torch.from_numpy(np.stack(points))
    return SceneBatch(
        normalised(grey),
        counts,
        torch.from_numpy(np.stack(boxes)),
        (places, torch.ones(places.shape[:2], dtype=torch.int64)),
        torch.from_numpy(np.concatenate(masks)[:, None]).float(),
        torch.from_numpy(np.stack(painted)).float(),
    )


def normalised(grey: Tensor) -> Tensor:
    """Grey 0 to 255, shape (B, 1, S, S), as SAM's three channels, shape (B, 3, S, S)."""
    return (grey - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


def shaken_box(generator: np.random.Generator, mask: np.ndarray, share: float = 0.5, most: float = 0.1) -> np.ndarray:
    """XYXY of a mask; for a share of the draws each edge is moved by up to `most` of the side, inside the picture."""
    i0, j0, i1, j1 = box_of(mask)
    slack = generator.uniform(-most, most, 4) * [j1 - j0, i1 - i0, j1 - j0, i1 - i0]
    if generator.random() >= share:
        slack *= 0
    height, width = mask.shape
    return np.clip(np.array([j0, i0, j1, i1]) + slack, 0, [width, height, width, height]).astype(np.float32)


def points_in(generator: np.random.Generator, mask: np.ndarray, count: int) -> np.ndarray:
    """XY of `count` pixels of a mask, drawn with replacement, shape (count, 2)."""
    rows, columns = np.nonzero(mask)
    chosen = generator.integers(len(rows), size=count)
    return np.stack([columns[chosen], rows[chosen]], axis=1).astype(np.float32)
