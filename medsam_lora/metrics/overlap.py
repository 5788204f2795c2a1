"""Voxel counts of two masks, and the overlap metrics made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from medsam_lora.geometry import Geometry
from medsam_lora.metrics.surface import SurfacePair, surface_pair


@dataclass(frozen=True)
class Counts:
    """The confusion matrix of two masks, in voxels.

    Parameters
    ----------
    tp, fp, fn, tn : int

    Examples
    --------
    >>> Counts(tp=2, fp=1, fn=3, tn=4).n_reference, Counts(tp=2, fp=1, fn=3, tn=4).n_prediction
    (5, 3)
    """

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def n_reference(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn

    @property
    def n_prediction(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp


@dataclass(frozen=True, eq=False)
class Comparison:
    """Reference and prediction of one region of one case: what every metric is a function of.

    Parameters
    ----------
    reference, prediction : ndarray of bool, shape geometry.shape
    geometry : Geometry
        Of the masks' grid, for metrics in millimetres: the native one, or the part of it that shows anything.
    n_outside : int
        Voxels of the native grid that were cut off because both masks are empty there: true negatives. No other
        metric sees a difference.

    Raises
    ------
    TypeError
        Where a mask is not boolean. Probabilities, sums of masks and label maps give numbers that look like Dice
        and are not: four perfect masks added up score 1.6.
    ValueError
        Where the shapes differ.
    """

    reference: np.ndarray
    prediction: np.ndarray
    geometry: Geometry
    n_outside: int = 0

    def __post_init__(self) -> None:
        for name, mask in (("reference", self.reference), ("prediction", self.prediction)):
            if mask.dtype != bool:
                raise TypeError(f"the {name} must be a mask of bool, not {mask.dtype}")
            if mask.shape != self.geometry.shape:
                raise ValueError(f"the {name} has the shape {mask.shape}, its grid {self.geometry.shape}")

    @cached_property
    def counts(self) -> Counts:
        """Voxel counts, taken once for all metrics."""
        counts = count(self.reference, self.prediction)
        return replace(counts, tn=counts.tn + self.n_outside)

    @cached_property
    def surfaces(self) -> SurfacePair:
        """The surfaces, measured once for all metrics."""
        return surface_pair(self.reference, self.prediction, self.geometry.spacing_mm)


def count(reference: np.ndarray, prediction: np.ndarray) -> Counts:
    """Count the voxels of two masks.

    Parameters
    ----------
    reference, prediction : ndarray of bool, equal shape

    Examples
    --------
    >>> count(np.array([True, True, False, False]), np.array([True, False, True, False]))
    Counts(tp=1, fp=1, fn=1, tn=1)
    """
    # Python integers: products of voxel counts overflow the int32 of some platforms.
    tp = int(np.count_nonzero(reference & prediction))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(reference)) - tp
    return Counts(tp=tp, fp=fp, fn=fn, tn=reference.size - tp - fp - fn)


def dice(comparison: Comparison) -> float:
    """Dice coefficient, 2 TP / (2 TP + FP + FN) [1]_, over the volume.

    References
    ----------
    .. [1] L. R. Dice, "Measures of the amount of ecologic association between species", Ecology 26(3), 1945.
    """
    c = comparison.counts
    return 2 * c.tp / (2 * c.tp + c.fp + c.fn)


def iou(comparison: Comparison) -> float:
    """Intersection over union (Jaccard index), TP / (TP + FP + FN), over the volume."""
    c = comparison.counts
    return c.tp / (c.tp + c.fp + c.fn)


def sensitivity(comparison: Comparison) -> float:
    """Share of the reference that was found (recall), TP / (TP + FN)."""
    c = comparison.counts
    return c.tp / (c.tp + c.fn)


def precision(comparison: Comparison) -> float:
    """Share of the prediction that is right (positive predictive value), TP / (TP + FP)."""
    c = comparison.counts
    return c.tp / (c.tp + c.fp)


def specificity(comparison: Comparison) -> float:
    """Share of the background that was left alone, TN / (TN + FP); 1 where the reference fills the volume.

    Empty masks need no policy here, so this is a number of every pair of masks. It depends on how much air the grid
    holds, and is 1 to three digits for any small lesion: compare it within one grid only.
    """
    c = comparison.counts
    return c.tn / (c.tn + c.fp) if c.tn + c.fp else 1.0
