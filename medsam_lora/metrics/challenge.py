"""The columns that a BraTS challenge adds to a case and region: surfaces, lesions, and the challenge's own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from medsam_lora.geometry import Geometry
from medsam_lora.metrics import WORST_DISTANCE_MM, Metric, score, worst_scores
from medsam_lora.metrics.lesionwise import CHALLENGES, LesionScores, lesionwise
from medsam_lora.metrics.overlap import Comparison, dice, specificity
from medsam_lora.metrics.surface import mean_distance, robust_hausdorff, surface_dice


def _hd95(comparison: Comparison) -> float:
    return robust_hausdorff(comparison.surfaces.distances)


SURFACE_METRICS: Final[Mapping[str, Metric]] = {
    "hd95_mm": Metric(_hd95, both_empty=0.0, worst=WORST_DISTANCE_MM),
    "nsd_1mm": Metric(lambda c: surface_dice(c.surfaces.distances, 1.0), both_empty=1.0, worst=0.0),
    "nsd_2mm": Metric(lambda c: surface_dice(c.surfaces.distances, 2.0), both_empty=1.0, worst=0.0),
    "assd_mm": Metric(lambda c: mean_distance(c.surfaces.distances), both_empty=0.0, worst=WORST_DISTANCE_MM),
}
"""Metrics of the surfaces of whole regions, by column."""

LEGACY_METRICS: Final[Mapping[str, Metric]] = {
    "legacy_dice": Metric(dice, both_empty=1.0, worst=0.0),
    "legacy_hd95_mm": SURFACE_METRICS["hd95_mm"],
}
"""Dice and HD95 of whole regions under the names the challenge gives them beside the lesion-wise ones."""


def challenge_scores(comparison: Comparison, challenge: str) -> dict[str, Any]:
    """The columns of a usable prediction.

    Parameters
    ----------
    comparison : Comparison
    challenge : str
        A key of `lesionwise.CHALLENGES`.

    Returns
    -------
    dict
        Every name of `io.tables.CHALLENGE_COLUMNS`, in that order.

    Examples
    --------
    >>> mask = np.zeros((9, 9, 9), bool)
    >>> mask[2:6, 2:6, 2:6] = True
    >>> pair = Comparison(mask, np.roll(mask, 1, axis=2), Geometry(mask.shape, np.eye(4)))
    >>> scores = challenge_scores(pair, "brats2023-men")
    >>> scores["hd95_mm"], scores["lesionwise_dice"], scores["lesions_tp"]
    (1.0, 0.75, 1)
    """
    lesions = lesionwise(
        comparison.reference,
        comparison.prediction,
        comparison.geometry.spacing_mm,
        CHALLENGES[challenge],
        comparison.surfaces if comparison.counts.n_reference and comparison.counts.n_prediction else None,
    )
    return {
        **score(comparison, SURFACE_METRICS),
        "specificity": specificity(comparison),
        **_lesions(lesions),
        **score(comparison, LEGACY_METRICS),
        "challenge": challenge,
    }


def failed_challenge_scores(reference: np.ndarray, geometry: Geometry, challenge: str) -> dict[str, Any]:
    """The columns of a prediction that is missing or unusable: the worst scores, and every lesion missed.

    Parameters
    ----------
    reference : ndarray of bool, shape geometry.shape
    geometry : Geometry
    challenge : str
        A key of `lesionwise.CHALLENGES`.
    """
    missed = lesionwise(reference, np.zeros_like(reference), geometry.spacing_mm, CHALLENGES[challenge])
    return {
        **worst_scores(SURFACE_METRICS),
        "specificity": 0.0,
        # Not the scores of an empty prediction, which is right where the reference has no lesion that counts.
        **_lesions(LesionScores(0.0, WORST_DISTANCE_MM, 0, 0, missed.fn)),
        **worst_scores(LEGACY_METRICS),
        "challenge": challenge,
    }


def _lesions(scores: LesionScores) -> dict[str, Any]:
    return {
        "lesionwise_dice": scores.dice,
        "lesionwise_hd95_mm": scores.hd95_mm,
        "lesions_tp": scores.tp,
        "lesions_fp": scores.fp,
        "lesions_fn": scores.fn,
    }
