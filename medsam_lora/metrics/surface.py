"""Distances between the surfaces of two masks, weighted by surface area, in mm.

A surface stands between voxels: on the lattice of voxel corners, every corner whose eight voxels are not all alike
carries the piece of marching-cubes surface inside the cube of their centres. Percentiles and means are over area,
not over counts of border voxels, so that they hardly depend on how a surface lies on the grid. This is the
definition of the BraTS 2023 evaluation [1]_; distances of border voxels (ITK, MONAI, MedPy) are other numbers.

References
----------
.. [1] S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy", Journal of
   Medical Internet Research 23(7), 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from medsam_lora.metrics.boxes import islands
from medsam_lora.metrics.marching_cubes import neighbour_codes, surface_areas
from medsam_lora.metrics.nearest import Nearest, nearest

PERCENTILE = 95.0


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """How far each of two surfaces lies from the other.

    Parameters
    ----------
    from_reference, from_prediction : ndarray of float64, shape (N,) and (M,)
        Of every surface element of one mask, the distance in mm to the nearest one of the other, ascending;
        infinite where the other mask is empty.
    reference_areas, prediction_areas : ndarray of float64, shape (N,) and (M,)
        Areas of these elements in mm².
    """

    from_reference: np.ndarray
    from_prediction: np.ndarray
    reference_areas: np.ndarray
    prediction_areas: np.ndarray


class SurfaceElements(NamedTuple):
    """Where a mask's surface stands on the lattice of voxel corners, and how much of it.

    Parameters
    ----------
    points : ndarray of int64, shape (N, 3)
        Lattice point ``i`` is the corner between the voxels ``i - 1`` and ``i`` along each axis.
    areas : ndarray of float64, shape (N,)
        In mm².
    """

    points: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True, eq=False)
class SurfacePair:
    """The surfaces of two masks of one grid, and where each lies nearest to the other: made by `surface_pair`.

    Parameters
    ----------
    reference, prediction : SurfaceElements
    from_reference, from_prediction : Nearest
        For the elements of one mask, in their order, the nearest element of the other.
    spacing_mm : tuple of float, length 3
    """

    reference: SurfaceElements
    prediction: SurfaceElements
    from_reference: Nearest
    from_prediction: Nearest
    spacing_mm: tuple[float, float, float]

    @cached_property
    def distances(self) -> SurfaceDistances:
        """Distances between the whole masks."""
        return _distances(
            self.from_reference.distances,
            self.from_prediction.distances,
            self.reference.areas,
            self.prediction.areas,
        )

    def between(self, of_reference: np.ndarray, of_prediction: np.ndarray) -> SurfaceDistances:
        """Distances between parts of the masks.

        Components of a mask that do not touch by a corner have no element in common, and each has in the whole mask
        the elements it has alone. So only elements whose nearest one is of another part are measured again.

        Parameters
        ----------
        of_reference, of_prediction : ndarray of bool, shape (N,) and (M,)
            Which elements are those of the part.

        Returns
        -------
        SurfaceDistances
        """
        if of_reference.all() and of_prediction.all():
            return self.distances
        return _distances(
            self._part(self.reference, self.prediction, self.from_reference, of_reference, of_prediction),
            self._part(self.prediction, self.reference, self.from_prediction, of_prediction, of_reference),
            self.reference.areas[of_reference],
            self.prediction.areas[of_prediction],
        )

    def _part(
        self, own: SurfaceElements, other: SurfaceElements, found: Nearest, of_own: np.ndarray, of_other: np.ndarray
    ) -> np.ndarray:
        distances = found.distances[of_own]
        lost = ~of_other[found.which[of_own]]
        if lost.any():
            distances[lost] = nearest(own.points[of_own][lost], other.points[of_other], self.spacing_mm).distances
        return distances


def surface_pair(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> SurfacePair:
    """Measure two masks of one grid against each other.

    Parameters
    ----------
    reference, prediction : ndarray of bool, shape (X, Y, Z)
        A mask that reaches the border of the grid ends there: outside is background.
    spacing_mm : sequence of float, length 3
        Distance of voxel centres along each array axis.

    Returns
    -------
    SurfacePair
    """
    x, y, z = (float(step) for step in spacing_mm)
    ours, theirs = surface_elements(reference, (x, y, z)), surface_elements(prediction, (x, y, z))
    there, back = nearest(ours.points, theirs.points, (x, y, z)), nearest(theirs.points, ours.points, (x, y, z))
    return SurfacePair(ours, theirs, there, back, (x, y, z))


def surface_distances(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceDistances:
    """Distances between the surfaces of two masks of one grid; see `surface_pair`.

    Examples
    --------
    >>> mask = np.zeros((8, 6, 6), bool)
    >>> mask[2:4, 2:4, 2:4] = True
    >>> distances = surface_distances(mask, np.roll(mask, 1, axis=0), (2.0, 1.0, 1.0))
    >>> robust_hausdorff(distances), surface_dice(distances, 2.0)
    (2.0, 1.0)
    """
    return surface_pair(reference, prediction, spacing_mm).distances


def robust_hausdorff(distances: SurfaceDistances, percent: float = PERCENTILE) -> float:
    """The larger of the two directed distances that `percent` of the surface area does not exceed (HD95), in mm.

    Infinite where exactly one mask is empty or both are; the policy of `medsam_lora.metrics` stands above this.
    """
    return max(
        _percentile(distances.from_reference, distances.reference_areas, percent),
        _percentile(distances.from_prediction, distances.prediction_areas, percent),
    )


def surface_dice(distances: SurfaceDistances, tolerance_mm: float) -> float:
    """Normalised surface Dice (NSD): the share of both surfaces' area that lies within `tolerance_mm` of the other.

    For masks that are not both empty.
    """
    near = distances.reference_areas[distances.from_reference <= tolerance_mm].sum()
    near += distances.prediction_areas[distances.from_prediction <= tolerance_mm].sum()
    return float(near / (distances.reference_areas.sum() + distances.prediction_areas.sum()))


def mean_distance(distances: SurfaceDistances) -> float:
    """Average symmetric surface distance (ASSD) in mm: the mean over the area of both surfaces together.

    For masks that both have a voxel. It is not the mean of the two directed means, which counts the elements of
    the smaller surface more.
    """
    total = (
        distances.from_reference @ distances.reference_areas + distances.from_prediction @ distances.prediction_areas
    )
    return float(total / (distances.reference_areas.sum() + distances.prediction_areas.sum()))


def surface_elements(mask: np.ndarray, spacing_mm: Sequence[float]) -> SurfaceElements:
    """The surface of a mask.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)
    spacing_mm : sequence of float, length 3

    Returns
    -------
    SurfaceElements
    """
    x, y, z = (float(step) for step in spacing_mm)
    table = surface_areas(x, y, z)
    points, areas = [np.zeros((0, 3), np.int64)], [np.zeros(0)]
    for box in islands(mask):
        codes = neighbour_codes(mask[box])
        # 0 and 255 are the cells without surface; in unsigned bytes, the two ends meet.
        found = np.flatnonzero(codes + np.uint8(1) > 1)
        points.append(np.stack(np.unravel_index(found, codes.shape), axis=1) + [axis.start for axis in box])
        areas.append(table[codes.ravel()[found]])
    return SurfaceElements(np.concatenate(points), np.concatenate(areas))


def _distances(there: np.ndarray, back: np.ndarray, own: np.ndarray, other: np.ndarray) -> SurfaceDistances:
    # By area within one distance, as the evaluation of BraTS does: the sum it compares with 0.95 depends on it.
    first, second = np.lexsort((own, there)), np.lexsort((other, back))
    return SurfaceDistances(there[first], back[second], own[first], other[second])


def _percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    if not len(distances):
        return float("inf")
    share = np.cumsum(areas) / areas.sum()
    return float(distances[min(int(np.searchsorted(share, percent / 100)), len(distances) - 1)])
