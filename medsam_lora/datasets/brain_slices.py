"""Transverse slices of lesion-free phantom brains with their structures, to teach what is anatomy and what is not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from scipy.ndimage import gaussian_filter, label

from medsam_lora.datasets.phantom_anatomy import HEAD_RADII_MM, draw_anatomy, tissue_at
from medsam_lora.datasets.phantom_image import render

OUTSIDE, FLUID, GREY, WHITE = range(4)
"""Classes of tissue in `BrainSlices.tissue`."""

STEP_MM: Final = 1.3
"""Pixel of the slices."""

_LOWEST_MM, _HIGHEST_MM = -35.0, 55.0
_LEAST_PIXELS = 12


@dataclass(frozen=True)
class BrainSlices:
    """Slices of heads without lesions; read-only, as they are kept.

    Parameters
    ----------
    images : ndarray of float32, shape (N, M, h, w)
        Grey from 0 to 1, as `models.input_spec` maps z-scores from -1 to 3; background exactly 0.
    tissue : ndarray of uint8, shape (N, h, w)
    right : ndarray of bool, shape (N, h, w)
        Right of the interhemispheric plane.
    """

    images: np.ndarray
    tissue: np.ndarray
    right: np.ndarray


@lru_cache(maxsize=1)
def brain_slices(seed: int = 715_000, heads: int = 8, per_head: int = 10) -> BrainSlices:
    """Slices of `heads` heads, `per_head` of each; the seed is far from those of cohorts, so no head is in both.

    Parameters
    ----------
    seed, heads, per_head : int

    Returns
    -------
    BrainSlices
    """
    x, y = (np.arange(-radius, radius, STEP_MM, dtype=np.float32) for radius in HEAD_RADII_MM[:2])
    images, classes, right = [], [], []
    for head in range(heads):
        anatomy = draw_anatomy(np.random.default_rng([seed, head, 0]))
        generator = np.random.default_rng([seed, head, 1])
        levels = np.linspace(_LOWEST_MM, _HIGHEST_MM, per_head) + generator.uniform(-4, 4, per_head)
        grid = np.meshgrid(levels.astype(np.float32), x, y, indexing="ij")
        points = np.stack([grid[1].ravel(), grid[2].ravel(), grid[0].ravel()])
        tissue = tissue_at(anatomy, points, STEP_MM)
        inside = tissue.head > 0
        signals = render(tissue, None, points, generator) * inside
        mean = signals[:, inside].mean(axis=1, keepdims=True)
        std = signals[:, inside].std(axis=1, keepdims=True)
        grey = np.clip(((signals - mean) / std + 1) / 4, 0.0, 1.0) * inside
        images.append(grey.reshape(len(grey), *grid[0].shape).swapaxes(0, 1))
        kinds = 1 + np.argmax(np.stack([tissue.csf, tissue.grey, tissue.white]), axis=0)
        classes.append((kinds * inside).astype(np.uint8).reshape(grid[0].shape))
        right.append((tissue.midline > 0).reshape(grid[0].shape))
    stacks = np.concatenate(images).astype(np.float32), np.concatenate(classes), np.concatenate(right)
    for stack in stacks:
        stack.setflags(write=False)
    return BrainSlices(*stacks)


def place_slice(
    generator: np.random.Generator, brains: BrainSlices, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One slice, turned, zoomed and moved, on the pixels of a picture.

    Parameters
    ----------
    generator : numpy.random.Generator
    brains : BrainSlices
    size : int
        Side of the picture.

    Returns
    -------
    image : ndarray of float32, shape (size, size)
    tissue : ndarray of uint8, shape (size, size)
    right : ndarray of bool, shape (size, size)
    """
    index, modality = int(generator.integers(len(brains.images))), int(generator.integers(brains.images.shape[1]))
    turns, flip = int(generator.integers(4)), int(generator.choice([-1, 1]))
    image, tissue, right = (
        np.rot90(part, turns)[::flip]
        for part in (brains.images[index, modality], brains.tissue[index], brains.right[index])
    )
    blur = generator.uniform(0.2, 0.9)
    image = gaussian_filter(image, blur, truncate=3.0) * (tissue > 0)
    zoom = generator.uniform(0.45, 1.15) * max(image.shape)
    weights, nearest = [], []
    for n in image.shape:
        start = (n - zoom) / 2 + generator.uniform(-0.15, 0.15) * n
        position = start + (np.arange(size) + 0.5) / size * zoom - 0.5
        # Linear interpolation as a matrix of hat functions; beyond the slice it is 0, as beyond the skull.
        weights.append(np.maximum(1 - np.abs(position[:, None] - np.arange(n)), 0).astype(np.float32))
        # One row of nothing behind the last stands for what lies outside.
        rounded = np.rint(position).astype(np.intp)
        nearest.append(np.where((rounded >= 0) & (rounded < n), rounded, n))
    rows, columns = np.ix_(*nearest)
    padded = [np.pad(part, ((0, 1), (0, 1))) for part in (tissue, right)]
    return weights[0] @ image @ weights[1].T, padded[0][rows, columns], padded[1][rows, columns]


def draw_structure(generator: np.random.Generator, tissue: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """A structure of a slice: the brain, a hemisphere, or a connected part of fluid, grey or white matter.

    Parameters
    ----------
    generator : numpy.random.Generator
    tissue : ndarray of uint8, shape (h, w)
    right : ndarray of bool, shape (h, w)

    Returns
    -------
    ndarray of bool, shape (h, w), or None
        None where what was chosen is not in this slice.
    """
    choice = int(generator.integers(6))
    half = right if generator.random() < 0.5 else ~right
    if choice == 0:
        mask = tissue != OUTSIDE
    elif choice == 1:
        mask = (tissue != OUTSIDE) & half
    elif choice == 2:
        mask = (tissue == WHITE) & half
    else:
        kind = (FLUID, GREY, FLUID)[choice - 3]
        # Without the thin bridges that join sulci and cortex all round the brain.
        smooth = gaussian_filter((tissue == kind).astype(np.float32), 0.012 * tissue.shape[0], truncate=3.0) > 0.5
        parts, count = label(smooth)
        if count == 0:
            return None
        areas = np.bincount(parts.ravel())[1:]
        large = np.flatnonzero(areas >= max(_LEAST_PIXELS, 0.1 * areas.max()))
        if large.size == 0:
            return None
        mask = parts == 1 + int(generator.choice(large))
    return mask if mask.sum() >= _LEAST_PIXELS else None
