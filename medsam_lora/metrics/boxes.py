"""Boxes around what a mask shows, so that no metric has to look at a whole volume of nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

Box = tuple[slice, ...]
"""One slice for each of the three axes."""

BLOCK = 8
"""Side in voxels of the blocks by which `islands` tells parts of a mask apart."""

# Merging boxes looks at every pair of them; a mask of more parts than this is dealt with as a whole.
_MOST_ISLANDS = 64


def bounding_box(mask: np.ndarray) -> Box | None:
    """The smallest box around a mask; None for an empty mask.

    Examples
    --------
    >>> mask = np.zeros((5, 5, 5), bool)
    >>> mask[1, 2, 3:] = True
    >>> bounding_box(mask)
    (slice(1, 2, None), slice(2, 3, None), slice(3, 5, None))
    """
    # One axis after the other, each within what the ones before left: most of a volume is looked at once only.
    box: list[slice] = []
    for axis in range(3):
        seen = np.flatnonzero(mask[tuple(box)].any(axis=tuple(a for a in range(3) if a != axis)))
        if not seen.size:
            return None
        box.append(slice(int(seen[0]), int(seen[-1]) + 1))
    return tuple(box)


def islands(mask: np.ndarray) -> list[Box]:
    """Boxes that share no voxel, together hold all of a mask, and cut no connected part of it.

    Voxels in different boxes are more than `BLOCK` voxels apart along an axis at least.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)

    Returns
    -------
    list of tuple of slice
        Empty for an empty mask; a single one for a mask of very many parts.

    Examples
    --------
    >>> mask = np.zeros((40, 4, 4), bool)
    >>> mask[[1, 3, 30], 2, 2] = True
    >>> [(box[0].start, box[0].stop) for box in islands(mask)]
    [(1, 4), (30, 31)]
    """
    whole = bounding_box(mask)
    if whole is None:
        return []
    part = mask[whole]
    if max(part.shape) <= 2 * BLOCK:
        return [whole]
    coarse, n = ndimage.label(_blocks(part), np.ones((3, 3, 3)))
    if n == 1 or n > _MOST_ISLANDS:
        return [whole]
    boxes: list[Box] = []
    for found in ndimage.find_objects(coarse):
        box = tuple(slice(s.start * BLOCK, min(s.stop * BLOCK, m)) for s, m in zip(found, part.shape, strict=True))
        # Boxes may meet where what they hold does not.
        while met := [other for other in boxes if _meet(box, other)]:
            boxes = [other for other in boxes if other not in met]
            box = around([box, *met])
        boxes.append(box)
    placed = []
    for box in boxes:
        tight = bounding_box(part[box])
        assert tight is not None  # every block of the box's component holds a voxel
        starts = [a.start + b.start + c.start for a, b, c in zip(whole, box, tight, strict=True)]
        placed.append(tuple(slice(s, s + t.stop - t.start) for s, t in zip(starts, tight, strict=True)))
    return placed


def around(boxes: Iterable[Box]) -> Box:
    """The smallest box around several."""
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _blocks(part: np.ndarray) -> np.ndarray:
    """Which blocks of `BLOCK` voxels along each axis hold a voxel of the mask."""
    padded = np.zeros([-(-n // BLOCK) * BLOCK for n in part.shape], bool)
    padded[tuple(slice(n) for n in part.shape)] = part
    # Eight voxels of one byte are one number.
    rows = padded.view(np.uint64) != 0
    x, y, z = rows.shape
    return rows.reshape(x // BLOCK, BLOCK, y // BLOCK, BLOCK, z).any(axis=(1, 3))


def _meet(one: Box, other: Box) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))
