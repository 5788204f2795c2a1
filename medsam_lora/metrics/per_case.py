"""What one case and region contributes to ``per_case.csv`` and to ``summary.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from medsam_lora.geometry import Geometry
from medsam_lora.metrics import score, worst_scores
from medsam_lora.metrics.challenge import challenge_scores, failed_challenge_scores
from medsam_lora.metrics.overlap import Comparison, Counts

NNUNET_METRICS: Final = ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref")
"""Names in a ``summary.json`` of nnU-Net v2."""


def region_scores(comparison: Comparison, challenge: str | None = None) -> dict[str, Any]:
    """The scored columns of a usable prediction.

    Parameters
    ----------
    comparison : Comparison
    challenge : str, optional
        A key of `lesionwise.CHALLENGES`, whose columns are added.

    Returns
    -------
    dict
        Every key of `METRICS`, and ``reference_volume_ml``, ``prediction_volume_ml``, ``n_slices`` and
        ``volume_difference_ml`` (prediction minus reference); then those of `challenge_scores`.
    """
    counts, ml = comparison.counts, comparison.geometry.voxel_volume_ml
    shown = comparison.reference | comparison.prediction
    return {
        **score(comparison),
        "reference_volume_ml": counts.n_reference * ml,
        "prediction_volume_ml": counts.n_prediction * ml,
        "n_slices": slices_showing(shown, comparison.geometry),
        # From counts, so that equal volumes differ by 0 and not by a rounding.
        "volume_difference_ml": (counts.n_prediction - counts.n_reference) * ml,
        **({} if challenge is None else challenge_scores(comparison, challenge)),
    }


def failed_scores(reference: np.ndarray, geometry: Geometry, challenge: str | None = None) -> dict[str, Any]:
    """The scored columns of a prediction that is missing or unusable: the worst scores, no volume of a prediction.

    Parameters
    ----------
    reference : ndarray of bool, shape geometry.shape
    geometry : Geometry
    challenge : str, optional
        As in `region_scores`.
    """
    return {
        **worst_scores(),
        "reference_volume_ml": int(np.count_nonzero(reference)) * geometry.voxel_volume_ml,
        "prediction_volume_ml": None,
        "n_slices": slices_showing(reference, geometry),
        "volume_difference_ml": None,
        **({} if challenge is None else failed_challenge_scores(reference, geometry, challenge)),
    }


def slices_showing(mask: np.ndarray, geometry: Geometry) -> int:
    """Number of transverse slices with a voxel of the mask.

    Parameters
    ----------
    mask : ndarray of bool, shape geometry.shape
    geometry : Geometry
        Tells which array axis runs from foot to head; it is axis 2 in BraTS files only.

    Examples
    --------
    >>> mask = np.zeros((2, 3, 4), bool)
    >>> mask[0, 1, 1:3] = True
    >>> slices_showing(mask, Geometry((2, 3, 4), np.eye(4)))
    2
    """
    codes = geometry.axis_codes
    axis = codes.index("S") if "S" in codes else codes.index("I")
    others = tuple(a for a in range(3) if a != axis)
    return int(np.count_nonzero(mask.any(axis=others)))


def nnunet_metrics(counts: Counts) -> dict[str, float | int]:
    """The metrics of one case and region under nnU-Net's names; both masks empty gives NaN for Dice and IoU.

    Examples
    --------
    >>> nnunet_metrics(Counts(tp=1, fp=1, fn=0, tn=6))["IoU"]
    0.5
    >>> nnunet_metrics(Counts(tp=0, fp=0, fn=0, tn=8))["Dice"]
    nan
    """
    union = counts.tp + counts.fp + counts.fn
    return {
        "Dice": 2 * counts.tp / (union + counts.tp) if union else math.nan,
        "IoU": counts.tp / union if union else math.nan,
        "TP": counts.tp,
        "FP": counts.fp,
        "FN": counts.fn,
        "TN": counts.tn,
        "n_pred": counts.n_prediction,
        "n_ref": counts.n_reference,
    }


def failed_nnunet_metrics(reference: np.ndarray) -> dict[str, float | int]:
    """The metrics of an unusable prediction: counted as an empty one, with Dice and IoU 0 even where both are empty."""
    n = int(np.count_nonzero(reference))
    return {**nnunet_metrics(Counts(tp=0, fp=0, fn=n, tn=reference.size - n)), "Dice": 0.0, "IoU": 0.0}


def nnunet_means(
    cases: Iterable[Mapping[str, Mapping[str, float | int]]],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The ``mean`` and ``foreground_mean`` blocks: over the cases, and of that over the regions.

    Parameters
    ----------
    cases : iterable of mapping
        Per case, region to metrics.

    Returns
    -------
    mean : dict of str to dict
        Region to metric to mean over the cases where it is not NaN; NaN where it is NaN in all of them.
    foreground_mean : dict of str to float
        NaN where a region has NaN, as in nnU-Net.

    Examples
    --------
    >>> mean, foreground = nnunet_means([{"WT": {"Dice": 0.5}}, {"WT": {"Dice": math.nan}}, {"WT": {"Dice": 1.0}}])
    >>> mean, foreground
    ({'WT': {'Dice': 0.75}}, {'Dice': 0.75})
    """
    gathered: dict[str, dict[str, list[float]]] = {}
    for case in cases:
        for region, metrics in case.items():
            lists = gathered.setdefault(region, {name: [] for name in metrics})
            for name, value in metrics.items():
                if not math.isnan(value):
                    lists[name].append(value)
    mean = {region: {name: _mean(values) for name, values in lists.items()} for region, lists in gathered.items()}
    names = list(next(iter(mean.values()), {}))
    return mean, {name: _mean([means[name] for means in mean.values()]) for name in names}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
