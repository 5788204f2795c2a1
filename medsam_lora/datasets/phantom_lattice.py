"""The lattice on which tumours of the phantom grow, and the front that carries oedema along white matter.

Oedema is an arrival time: a front leaves the core and runs fast in white matter, slowly in grey, hardly at all in
fluid, as in the diffusion models of glioma growth in which white matter conducts several times better than grey
(Swanson et al. 2000, Cell Proliferation 33:317).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from scipy.ndimage import map_coordinates

from medsam_lora.datasets.phantom_anatomy import HEAD_RADII_MM, Anatomy, Tissue, tissue_at

STEP_MM: Final = 2.5
"""Spacing of the lattice."""

SLOWNESS: Final = {"white": 1.0, "grey": 6.0, "csf": 25.0}
"""Travel time of the front per mm, relative to white matter."""

_OUTSIDE_SLOWNESS = 30.0
_MARGIN_MM = 35.0


@dataclass(frozen=True)
class Lattice:
    """A brain sampled for growing tumours.

    Parameters
    ----------
    shape : tuple of int
    points : ndarray of float32, shape (3, N)
        Head frame, mm, in the C order of `shape`.
    tissue : Tissue
        At the points.
    """

    shape: tuple[int, int, int]
    points: np.ndarray
    tissue: Tissue

    def sample(self, values: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Trilinear interpolation of values on the lattice, shape (N,) or `shape`, at points (3, M) to (M,)."""
        index = (points - self.points[:, :1]) / np.float32(STEP_MM)
        return map_coordinates(values.reshape(self.shape), index, output=np.float32, order=1, mode="nearest")


def brain_lattice(anatomy: Anatomy) -> Lattice:
    """Sample a brain for growing tumours."""
    axes = [np.arange(-radius, radius + STEP_MM, STEP_MM, dtype=np.float32) for radius in HEAD_RADII_MM]
    grid = np.meshgrid(*axes, indexing="ij")
    points = np.stack([axis.ravel() for axis in grid])
    near = np.flatnonzero(((points / np.array(HEAD_RADII_MM, np.float32)[:, None]) ** 2).sum(axis=0) < 1)
    inside = tissue_at(anatomy, points[:, near], STEP_MM)
    # Beyond the head there is nothing, which the front passes like fluid.
    filled = {}
    for name, outside in (("head", -99), ("csf", 1), ("grey", 0), ("white", 0), ("surface", -99), ("midline", 0)):
        filled[name] = np.full(points.shape[1], outside, np.float32)
        filled[name][near] = getattr(inside, name)
    x, y, z = grid[0].shape
    return Lattice((x, y, z), points, Tissue(**filled))


def oedema_arrival(lattice: Lattice, start: np.ndarray, roughness: np.ndarray, radius_mm: float) -> np.ndarray:
    """Arrival time of the front at every lattice point, in mm of white matter.

    Parameters
    ----------
    lattice : Lattice
    start : ndarray of bool, shape (N,)
        The core.
    roughness : ndarray of float32, shape (N,)
        Random; its exponential varies the slowness.
    radius_mm : float
        Of the core. The front is followed to 35 mm and this far from it; beyond, it arrives as late as at the latest.

    Returns
    -------
    ndarray of float32, shape (N,)
    """
    tissue = lattice.tissue
    slowness = sum(slow * getattr(tissue, name) for name, slow in SLOWNESS.items()) * np.exp(roughness)
    slowness = (slowness + _OUTSIDE_SLOWNESS * (tissue.head < 0.5)).astype(np.float32).reshape(lattice.shape)
    start = start.reshape(lattice.shape)
    margin = int((_MARGIN_MM + radius_mm) / STEP_MM)
    box = []
    for axis in range(3):
        found = np.flatnonzero(start.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(int(found[0]) - margin, 0), int(found[-1]) + margin + 1))
    near = arrival_times(start[tuple(box)], slowness[tuple(box)], STEP_MM)
    times = np.full(lattice.shape, near.max(), np.float32)
    times[tuple(box)] = near
    return times.ravel()


def arrival_times(start: np.ndarray, slowness: np.ndarray, step_mm: float) -> np.ndarray:
    """Shortest travel time from a set of lattice points to every other one, over the 18 nearest neighbours.

    Parameters
    ----------
    start : ndarray of bool, shape (X, Y, Z)
    slowness : ndarray of float32, shape (X, Y, Z)
        Time per mm; a link costs the mean of its two ends.
    step_mm : float
        Spacing of the lattice.

    Returns
    -------
    ndarray of float32, shape (X, Y, Z)

    Examples
    --------
    >>> start = np.array([1, 0, 0, 0], bool).reshape(4, 1, 1)
    >>> arrival_times(start, np.array([1, 1, 3, 1], np.float32).reshape(4, 1, 1), 2.0).ravel().tolist()
    [0.0, 2.0, 6.0, 10.0]
    """
    times = np.where(start, 0, np.inf).astype(np.float32)
    links = []
    for offset in product((-1, 0, 1), repeat=3):
        length = sum(abs(o) for o in offset)
        if length in (1, 2):
            to = tuple(slice(max(o, 0), n + min(o, 0)) for o, n in zip(offset, start.shape, strict=True))
            of = tuple(slice(max(-o, 0), n + min(-o, 0)) for o, n in zip(offset, start.shape, strict=True))
            links.append((to, of, np.float32(0.5 * step_mm * length**0.5) * (slowness[to] + slowness[of])))
    while True:
        before = times.copy()
        for to, of, cost in links:
            np.minimum(times[to], times[of] + cost, out=times[to])
        if np.array_equal(before, times):
            return times


def level_of_volume(values: np.ndarray, volume_ml: float) -> float:
    """The value below which lattice points of that volume lie.

    Examples
    --------
    >>> level_of_volume(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), 2 * STEP_MM**3 / 1000)
    3.0
    """
    count = min(max(round(volume_ml * 1000 / STEP_MM**3), 1), values.size - 1)
    return float(np.partition(values, count)[count])


def filled_box_dice(mask: np.ndarray) -> float:
    """Dice over the whole volume of a mask with its filled bounding box in every slice along the last axis.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)

    Returns
    -------
    float
        1 where the mask is empty.

    Examples
    --------
    >>> round(filled_box_dice(np.eye(2, dtype=bool)[:, :, None]), 4)
    0.6667
    """
    filled = 0
    for k in np.flatnonzero(mask.any(axis=(0, 1))):
        i, j = np.flatnonzero(mask[:, :, k].any(axis=1)), np.flatnonzero(mask[:, :, k].any(axis=0))
        filled += (int(i[-1]) - int(i[0]) + 1) * (int(j[-1]) - int(j[0]) + 1)
    count = int(mask.sum())
    return 2 * count / (count + filled) if count else 1.0
