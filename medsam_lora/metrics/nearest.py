"""The nearest of many lattice points, exactly: first by looking around each point, then by a tree for the far ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

# Steps that are looked at around a point, nearest first. Two surfaces that agree at all lie within two voxels of each
# other nearly everywhere, and 33 steps are the ball of that radius; more cost as much as the tree for what they find.
_N_STEPS = 33
_REACH = 3


class Nearest(NamedTuple):
    """Of every point the nearest of the others.

    Parameters
    ----------
    distances : ndarray of float64, shape (N,)
        In mm; infinite where there are no others.
    which : ndarray of int64, shape (N,)
        Which of the others it is; one of them where several are as near, -1 where there are none.
    """

    distances: np.ndarray
    which: np.ndarray


def nearest(points: np.ndarray, others: np.ndarray, spacing_mm: Sequence[float]) -> Nearest:
    """Find the nearest of the others for every point of a lattice.

    Parameters
    ----------
    points, others : ndarray of int64, shape (N, 3) and (M, 3)
        Lattice indices; no point twice among the others.
    spacing_mm : sequence of float, length 3
        Step of the lattice along each axis.

    Returns
    -------
    Nearest

    Examples
    --------
    >>> found = nearest(np.array([[0, 0, 0], [9, 0, 0]]), np.array([[0, 0, 1], [0, 3, 0]]), (1.0, 2.0, 5.0))
    >>> found.distances.tolist(), found.which.tolist()
    ([5.0, 10.295630140987], [0, 0])
    """
    if not len(points) or not len(others):
        return Nearest(np.full(len(points), np.inf), np.full(len(points), -1))
    steps, lengths = _steps(*(float(step) for step in spacing_mm))
    # One flat array of which point stands where, wide enough for every step: a step is then one number to add.
    low = np.minimum(points.min(axis=0), others.min(axis=0)) - _REACH
    shape = np.maximum(points.max(axis=0), others.max(axis=0)) + _REACH + 1 - low
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    lattice = np.zeros(int(shape.prod()), np.int32)
    lattice[(others - low) @ strides] = np.arange(1, len(others) + 1, dtype=np.int32)
    distances, index = np.empty(len(points)), np.empty(len(points), np.int64)
    left, places = np.arange(len(points)), (points - low) @ strides
    for step, length in zip((steps @ strides).tolist(), lengths.tolist(), strict=True):
        found = lattice[places + step]
        hit = found > 0
        distances[left[hit]], index[left[hit]] = length, found[hit] - 1
        left, places = left[~hit], places[~hit]
        if not left.size:
            return Nearest(distances, index)
    spacing = np.asarray(spacing_mm, np.float64)
    # Any balance of the tree gives the same neighbours; the sliding midpoint is built several times faster.
    tree = cKDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    _, index[left] = tree.query(points[left] * spacing)
    distances[left] = _length(points[left] - others[index[left]], spacing)
    return Nearest(distances, index)


def _length(steps: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    # From whole steps: products with the spacing round, and elements at one distance must compare as equal.
    return np.sqrt(((steps * spacing) ** 2).sum(axis=1))


@lru_cache(maxsize=64)
def _steps(x_mm: float, y_mm: float, z_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """The shortest steps on the lattice and their lengths, ascending."""
    spacing = np.array([x_mm, y_mm, z_mm])
    steps = np.indices([2 * _REACH + 1] * 3).reshape(3, -1).T - _REACH
    lengths = _length(steps, spacing)
    # Whatever is not in the cube is farther than this, so that what is nearer is all there is.
    known = lengths < (_REACH + 1) * spacing.min()
    steps, lengths = steps[known], lengths[known]
    order = np.argsort(lengths, kind="stable")[:_N_STEPS]
    return steps[order], lengths[order]
