"""Means over cases and their bootstrap intervals, resampling patients."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable], n: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over cases with a percentile bootstrap interval of 95 % [1]_.

    Patients are resampled, not cases: the cases of one patient resemble each other, and resampling them one by one
    gives an interval that is too narrow. A resample draws as many patients as there are, with replacement, and
    takes the mean over all their cases.

    Parameters
    ----------
    values : sequence of float, shape (N,)
        One score per case, finite.
    groups : sequence, length N
        The patient of each case.
    n : int
        Number of resamples.
    seed : int
        Equal seeds draw equal patients, so that intervals of two methods over the same cases are comparable.

    Returns
    -------
    mean, low, high : float
        With a single patient all three are equal: there is nothing to estimate an interval from.

    Raises
    ------
    ValueError
        Where there is no value, a value is not finite, or the lengths differ.

    References
    ----------
    .. [1] B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap", Chapman & Hall, 1993, section 13.3.

    Examples
    --------
    >>> bootstrap_mean([0.5, 0.5, 0.5], ["a", "b", "c"])
    (0.5, 0.5, 0.5)
    >>> mean, low, high = bootstrap_mean([0.2, 0.4, 0.9], ["a", "b", "c"])
    >>> low < mean < high
    True
    """
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not scores.size or len(groups) != scores.size:
        raise ValueError(f"{scores.shape} values and {len(groups)} groups: one group per value is needed")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite; give failed cases a value by the policy of the metrics")
    if n < 1:
        raise ValueError(f"{n} resamples")
    mean = float(scores.mean())
    # Sorted patients make the result independent of the order of the rows; deviations instead of scores make it
    # exact for equal scores.
    index = {group: i for i, group in enumerate(sorted(set(groups), key=str))}
    member = np.array([index[group] for group in groups])
    sums = np.bincount(member, scores - mean, minlength=len(index))
    sizes = np.bincount(member, minlength=len(index))
    if len(index) == 1:
        return mean, mean, mean
    drawn = np.random.default_rng(seed).integers(len(index), size=(n, len(index)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return mean, mean + float(low), mean + float(high)


def summarise(rows: Iterable[Mapping[str, Any]], n: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """The mean Dice of every method and region, with its interval.

    Parameters
    ----------
    rows : iterable of mapping
        Rows of ``per_case.csv`` with ``method``, ``region``, ``patient_id`` and ``dice`` (numbers, or text as read
        from a CSV). Failed rows count with the value they carry.
    n, seed : int
        As in `bootstrap_mean`.

    Returns
    -------
    list of dict
        Rows of ``summary.csv`` in the order in which methods and regions first appear.

    Examples
    --------
    >>> summarise([{"method": "lora", "region": "WT", "patient_id": "a", "dice": "0.75"}])
    [{'method': 'lora', 'region': 'WT', 'n_cases': 1, 'dice_mean': 0.75, 'dice_low': 0.75, 'dice_high': 0.75}]
    """
    gathered: dict[tuple[str, str], tuple[list[float], list[str]]] = {}
    for row in rows:
        values, patients = gathered.setdefault((row["method"], row["region"]), ([], []))
        values.append(float(row["dice"]))
        patients.append(row["patient_id"])
    table = []
    for (method, region), (values, patients) in gathered.items():
        mean, low, high = bootstrap_mean(values, patients, n, seed)
        table.append(
            {
                "method": method,
                "region": region,
                "n_cases": len(values),
                "dice_mean": mean,
                "dice_low": low,
                "dice_high": high,
            }
        )
    return table
