"""Scores of one case and region, and the one policy for empty masks.

A score is always that of a whole volume on the native grid; a mean of per-slice scores is another number (it can
differ by 0.08 for the same masks) and is never formed here.

The empty-mask policy, which holds for every metric of the table:

====================  =================================  =================
masks                 overlap (Dice, IoU, and so on)     distances
====================  =================================  =================
both empty            1                                  0 mm
exactly one empty     0                                  374 mm
prediction unusable   0                                  374 mm
====================  =================================  =================

A share of surface area (NSD) counts as overlap. Specificity needs no policy: a volume always has background. The
lesion-wise scores are those of the challenge: 1 and 0 mm where no lesion counts and nothing was found in vain.

A new metric is one function of a `Comparison` and one line of `METRICS`. The columns that a challenge adds stand in
`medsam_lora.metrics.challenge`; they are computed where one was named, as they take most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from medsam_lora.metrics import overlap
from medsam_lora.metrics.overlap import Comparison

WORST_DISTANCE_MM: Final = 374.0
"""Distance given where one mask is empty: the diagonal of a BraTS volume, sqrt(240² + 240² + 155²) = 373.1 mm,
rounded up, as in the BraTS 2023 evaluation."""


@dataclass(frozen=True)
class Metric:
    """A metric and its values where a mask is empty.

    Parameters
    ----------
    compute : callable, Comparison to float
        Called only where both masks have a voxel, so that no definition has to think of 0 / 0.
    both_empty : float
        The value where both masks are empty: the best one.
    worst : float
        The value where exactly one mask is empty, and of a prediction that cannot be scored.
    """

    compute: Callable[[Comparison], float]
    both_empty: float
    worst: float


def _overlap_metric(compute: Callable[[Comparison], float]) -> Metric:
    return Metric(compute, both_empty=1.0, worst=0.0)


METRICS: Final[Mapping[str, Metric]] = {
    "dice": _overlap_metric(overlap.dice),
    "iou": _overlap_metric(overlap.iou),
    "sensitivity": _overlap_metric(overlap.sensitivity),
    "precision": _overlap_metric(overlap.precision),
}
"""Every metric, by the name of its column in ``per_case.csv``."""


def score(comparison: Comparison, metrics: Mapping[str, Metric] = METRICS) -> dict[str, float]:
    """Every metric of a comparison, with the empty-mask policy.

    Parameters
    ----------
    comparison : Comparison
    metrics : mapping of str to Metric

    Returns
    -------
    dict of str to float
        In the order of `metrics`.

    Examples
    --------
    >>> import numpy as np
    >>> from medsam_lora.geometry import Geometry
    >>> grid = Geometry((4, 1, 1), np.eye(4))
    >>> def mask(*voxels):
    ...     return np.array(voxels, bool).reshape(4, 1, 1)
    >>> score(Comparison(mask(1, 1, 1, 0), mask(0, 0, 1, 0), grid))
    {'dice': 0.5, 'iou': 0.3333333333333333, 'sensitivity': 0.3333333333333333, 'precision': 1.0}
    >>> score(Comparison(mask(0, 0, 0, 0), mask(0, 0, 0, 0), grid))["dice"]
    1.0
    """
    counts = comparison.counts
    if counts.n_reference and counts.n_prediction:
        return {name: float(metric.compute(comparison)) for name, metric in metrics.items()}
    if counts.n_reference or counts.n_prediction:
        return worst_scores(metrics)
    return {name: metric.both_empty for name, metric in metrics.items()}


def worst_scores(metrics: Mapping[str, Metric] = METRICS) -> dict[str, float]:
    """The scores of a prediction that is missing or cannot be scored.

    Examples
    --------
    >>> worst_scores()
    {'dice': 0.0, 'iou': 0.0, 'sensitivity': 0.0, 'precision': 0.0}
    """
    return {name: metric.worst for name, metric in metrics.items()}
