"""Boxes in a slice: made from a mask, jittered, and brought to the model frame.

A box is ``(i0, j0, i1, j1)`` on voxel edges, half-open: one foreground voxel gives a box of width 1. SAM's order XYXY
(x = column = axis j) exists in the model frame only, and `to_model` alone makes it.
"""

from __future__ import annotations

import numpy as np

# Components touch over corners too: a thin oblique rim is one lesion.
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


def boxes_from_mask(mask: np.ndarray, kind: str = "union", min_voxels: int = 1) -> np.ndarray:
    """Boxes around the foreground of a slice.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y)
    kind : str
        A key of `prompts.BOX_KINDS`: ``union``, one box around all foreground, or ``per_component``, one around each
        8-connected component.
    min_voxels : int
        Components smaller than this get no box; ``union`` covers them all the same.

    Returns
    -------
    ndarray of float32, shape (n, 4)
        On voxel edges; n is 0 for an empty mask.

    Examples
    --------
    >>> mask = np.zeros((6, 6), bool)
    >>> mask[1, 2] = mask[4:6, 4] = True
    >>> boxes_from_mask(mask).tolist()
    [[1.0, 2.0, 6.0, 5.0]]
    >>> boxes_from_mask(mask, "per_component").tolist()
    [[1.0, 2.0, 2.0, 3.0], [4.0, 4.0, 6.0, 5.0]]
    """
    from medsam_lora.prompts import BOX_KINDS

    return BOX_KINDS[kind](np.asarray(mask, bool), min_voxels)


def union_box(mask: np.ndarray, min_voxels: int = 1) -> np.ndarray:
    """One box around all foreground of a mask (X, Y), whatever the size of its components."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.zeros((0, 4), np.float32)
    return np.array([[rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]], np.float32)


def component_boxes(mask: np.ndarray, min_voxels: int = 1) -> np.ndarray:
    """One box around each 8-connected component of a mask (X, Y) of at least `min_voxels` voxels."""
    from scipy import ndimage

    labelled, _ = ndimage.label(mask, _EIGHT_NEIGHBOURS)
    boxes = [
        (rows.start, columns.start, rows.stop, columns.stop)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labelled), start=1)
        if np.count_nonzero(labelled[rows, columns] == number) >= min_voxels
    ]
    return np.array(boxes, np.float32).reshape(-1, 4)


def jitter(
    boxes: np.ndarray, limit_model_px: float, scale: float, shape: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """Shift each edge of each box by a uniform draw, for training.

    The limit is given in model pixels, as published (0-20 pixels of the 1024 frame): the same number of native voxels
    would destroy the box of a small lesion.

    Parameters
    ----------
    boxes : ndarray of float, shape (n, 4)
        On voxel edges of the slice.
    limit_model_px : float
        Largest shift in model pixels.
    scale : float
        Model pixels per voxel, from `transforms.resizing.model_scale`.
    shape : tuple of int, (X, Y)
        Of the slice, which no edge leaves.
    generator : numpy.random.Generator

    Returns
    -------
    ndarray of float32, shape (n, 4)
        Of at least one voxel along each axis.
    """
    limit = limit_model_px / scale
    moved = np.asarray(boxes, np.float64) + generator.uniform(-limit, limit, np.shape(boxes))
    for axis, n in enumerate(shape):
        low, high = np.clip(moved[:, axis], 0, n), np.clip(moved[:, axis + 2], 0, n)
        # What has become thinner than a voxel (or inverted) is one voxel wide about its middle, inside the slice.
        thin = high - low < 1
        middle = np.clip((low + high) / 2, 0.5, n - 0.5)
        moved[:, axis] = np.where(thin, middle - 0.5, low)
        moved[:, axis + 2] = np.where(thin, middle + 0.5, high)
    return moved.astype(np.float32)


def to_model(boxes: np.ndarray, scale: float) -> np.ndarray:
    """Bring boxes to the model frame, in SAM's order.

    Edges times scale is exact: SAM's prompt encoder adds its own half pixel.

    Parameters
    ----------
    boxes : ndarray of float, shape (n, 4)
        (i0, j0, i1, j1) on voxel edges of a slice that is fed as rows = i, columns = j.
    scale : float
        Model pixels per voxel.

    Returns
    -------
    ndarray of float32, shape (n, 4)
        (x0, y0, x1, y1) with x = column = axis j, y = row = axis i.

    Examples
    --------
    >>> to_model(np.array([[1, 2, 3, 5]]), 2.0).tolist()
    [[4.0, 2.0, 10.0, 6.0]]
    """
    i0, j0, i1, j1 = (np.asarray(boxes, np.float64).reshape(-1, 4) * scale).T
    return np.stack([j0, i0, j1, i1], axis=1).astype(np.float32)
