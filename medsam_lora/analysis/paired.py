"""Statistics of paired differences: Wilcoxon's signed-rank test, Holm's correction, effect sizes, wins.

A difference is one number per pair, method minus baseline. None of these functions knows of patients: give them one
difference per patient where a patient has several cases, so that repeated cases do not count as new evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_EXACT = 100
"""Up to this many differences other than 0 the p-value is exact; beyond, it is at most 0.002 off."""

# Means over a patient's cases differ by roundings where they are equal; scores carry far fewer digits than this.
_DIGITS = 12


def wilcoxon(differences: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Wilcoxon's signed-rank test, two-sided [1]_.

    Differences of 0 are left out, as Wilcoxon did. Equal absolute differences share the mean of their ranks. Up to
    `MOST_EXACT` differences, p counts all ways to give the ranks signs, ties included, so that small cohorts need no
    approximation; above, the normal approximation with its correction for ties is used.

    Parameters
    ----------
    differences : sequence of float, shape (N,)
        Finite, one per pair.

    Returns
    -------
    statistic : float
        The smaller of the sums of ranks of positive and of negative differences.
    p_value : float
        1 where all differences are 0. With n differences other than 0 it cannot be below ``smallest_p(n)``.

    Raises
    ------
    ValueError
        Where there is no difference, or one is not finite.

    References
    ----------
    .. [1] F. Wilcoxon, "Individual comparisons by ranking methods", Biometrics Bulletin 1(6), 1945.

    Examples
    --------
    >>> wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5])  # 2 of the 32 sign patterns are as extreme
    (0.0, 0.0625)
    >>> wilcoxon([0.0, 0.0])
    (0.0, 1.0)
    """
    ranks, positive = _signed_ranks(differences)
    if not ranks.size:
        return 0.0, 1.0
    above = float(ranks[positive].sum())
    statistic = min(above, float(ranks.sum()) - above)
    p_value = _exact_p(ranks, statistic) if ranks.size <= MOST_EXACT else _normal_p(ranks, statistic)
    return statistic, p_value


def smallest_p(n: int) -> float:
    """The smallest two-sided p-value that a signed-rank test of `n` differences can give.

    Examples
    --------
    >>> smallest_p(5), smallest_p(1)
    (0.0625, 1.0)
    """
    return min(1.0, 2.0 ** (1 - n))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method [1]_.

    The probability that any true null hypothesis of the family is rejected stays below the level, whatever the
    dependence between the tests.

    Parameters
    ----------
    p_values : sequence of float, length M
        Of one family of tests, in [0, 1].

    Returns
    -------
    list of float
        In the order given, at most 1.

    References
    ----------
    .. [1] S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics
       6(2), 1979.

    Examples
    --------
    >>> holm([0.25, 0.0625, 0.125])
    [0.25, 0.1875, 0.25]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def rank_biserial(differences: Sequence[float] | np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation [1]_: how one-sided the signed ranks are.

    The sum of ranks of positive differences minus that of negative ones, over the sum of all; differences of 0 are
    left out. 1 where every difference is positive, -1 where every one is negative, 0 where they balance or all are 0.

    Parameters
    ----------
    differences : sequence of float, shape (N,)

    References
    ----------
    .. [1] D. S. Kerby, "The simple difference formula: an approach to teaching nonparametric correlation",
       Comprehensive Psychology 3, 2014.

    Examples
    --------
    >>> rank_biserial([0.3, 0.2, -0.1])  # ranks 3 and 2 against 1: (5 - 1) / 6
    0.6666666666666666
    """
    ranks, positive = _signed_ranks(differences)
    total = float(ranks.sum())
    return 0.0 if not total else (2 * float(ranks[positive].sum()) - total) / total


def cohens_dz(differences: Sequence[float] | np.ndarray) -> float | None:
    """Cohen's d_z [1]_: the mean difference over the standard deviation (N - 1) of the differences.

    Parameters
    ----------
    differences : sequence of float, shape (N,)

    Returns
    -------
    float or None
        None where the differences have no spread, as a single one has none; 0 where all are 0.

    References
    ----------
    .. [1] J. Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd ed., 1988, section 2.3.5.

    Examples
    --------
    >>> cohens_dz([1.0, 2.0, 3.0])
    2.0
    """
    values = _rounded(differences)
    if not values.any():
        return 0.0
    if values.size < 2 or float(np.ptp(values)) == 0.0:
        return None
    return float(values.mean() / values.std(ddof=1))


def win_tie_loss(differences: Sequence[float] | np.ndarray, higher_is_better: bool = True) -> tuple[int, int, int]:
    """Numbers of pairs in which the method is better, equal, and worse.

    Parameters
    ----------
    differences : sequence of float, shape (N,)
        Method minus baseline.
    higher_is_better : bool
        False for distances.

    Examples
    --------
    >>> win_tie_loss([0.1, 0.0, -0.2, -0.3]), win_tie_loss([0.1, 0.0, -0.2, -0.3], higher_is_better=False)
    ((1, 1, 2), (2, 1, 1))
    """
    values = _rounded(differences)
    above, below = int((values > 0).sum()), int((values < 0).sum())
    ties = values.size - above - below
    return (above, ties, below) if higher_is_better else (below, ties, above)


def means_by_group(values: Sequence[float] | np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Mean of each group's values, groups in alphabetical order.

    Examples
    --------
    >>> means_by_group([1.0, 2.0, 4.0], ["b", "a", "b"])
    {'a': 2.0, 'b': 2.5}
    """
    gathered: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        gathered.setdefault(group, []).append(float(value))
    return {group: math.fsum(gathered[group]) / len(gathered[group]) for group in sorted(gathered)}


def _rounded(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("no differences")
    if not np.isfinite(values).all():
        raise ValueError("a difference is not finite")
    return np.round(values, _DIGITS)


def _signed_ranks(differences: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the absolute differences other than 0, ties at their mean rank, and which of them are positive."""
    values = _rounded(differences)
    values = values[values != 0]
    _, place, counts = np.unique(np.abs(values), return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[place.reshape(-1)], values > 0


def _exact_p(ranks: np.ndarray, statistic: float) -> float:
    # Mean ranks are whole or half: doubled, the sums are whole numbers, and the distribution of the sum of positive
    # ranks under random signs builds up rank by rank.
    doubled = np.rint(2 * ranks).astype(int)
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(chances)
        shifted[rank:] = chances[: chances.size - rank]
        chances = (chances + shifted) / 2
    return min(1.0, 2 * float(chances[: round(2 * statistic) + 1].sum()))


def _normal_p(ranks: np.ndarray, statistic: float) -> float:
    # The variance of the sum under random signs is a quarter of the sum of squares; ties are in it already.
    deviation = abs(statistic - ranks.sum() / 2) / math.sqrt(float((ranks**2).sum()) / 4)
    return math.erfc(deviation / math.sqrt(2))
