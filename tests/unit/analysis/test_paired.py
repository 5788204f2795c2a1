"""Paired statistics against values by hand, an enumeration of all signs, and scipy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from medsam_lora.analysis.paired import (
    MOST_EXACT,
    cohens_dz,
    holm,
    means_by_group,
    rank_biserial,
    smallest_p,
    wilcoxon,
    win_tie_loss,
)


def enumerated_p(differences: list[float]) -> float:
    """The share of all sign patterns whose smaller rank sum is at most the one seen."""
    kept = [d for d in differences if d]
    ranks = stats.rankdata(np.abs(kept))

    def smaller(signs: tuple[bool, ...]) -> float:
        above = sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        return min(above, sum(ranks) - above)

    seen = smaller(tuple(d > 0 for d in kept))
    patterns = list(product((False, True), repeat=len(kept)))
    return sum(smaller(signs) <= seen for signs in patterns) / len(patterns)


def test_five_positive_differences_give_2_of_32():
    assert wilcoxon([0.3, 0.1, 0.2, 0.5, 0.4]) == (0.0, 2 / 32)
    assert wilcoxon([-0.3, -0.1, -0.2, -0.5, -0.4]) == (0.0, 2 / 32)


def test_one_small_negative_difference_by_hand():
    # Ranks 1 (negative), 2, 3, 4. Smaller sum 1: patterns {}, {1} and their mirror images, 4 of 16.
    assert wilcoxon([-0.1, 0.2, 0.3, 0.4]) == (1.0, 4 / 16)


def test_zeros_are_left_out_and_all_zero_is_no_error():
    assert wilcoxon([0.0, 0.2, 0.0, 0.3, 0.4]) == (0.0, 2 / 8)
    assert wilcoxon([0.0, 0.0, 0.0]) == (0.0, 1.0)
    assert rank_biserial([0.0, 0.0]) == 0.0 and cohens_dz([0.0, 0.0]) == 0.0


def test_roundings_are_ties_and_zeros():
    assert wilcoxon([0.1 + 0.2 - 0.3, 0.5]) == (0.0, 1.0)
    assert win_tie_loss([0.1 + 0.2 - 0.3]) == (0, 1, 0)


@pytest.mark.parametrize("seed", range(6))
def test_ties_equal_the_enumeration_of_all_signs(seed: int):
    rng = np.random.default_rng(seed)
    differences = (rng.integers(-3, 5, size=10) / 4).tolist()
    assert wilcoxon(differences)[1] == pytest.approx(enumerated_p(differences), abs=1e-12)


@pytest.mark.parametrize("n", [6, 25, MOST_EXACT])
def test_without_ties_equals_scipys_exact_test(n: int):
    differences = np.random.default_rng(n).normal(0.2, 1, n)
    expected = stats.wilcoxon(differences, method="exact")
    assert wilcoxon(differences) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_large_cohorts_equal_scipys_normal_approximation_with_ties_and_zeros():
    differences = np.random.default_rng(1).integers(-5, 7, size=3 * MOST_EXACT) / 8
    expected = stats.wilcoxon(differences, zero_method="wilcox", correction=False, method="approx")
    assert wilcoxon(differences) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)


def test_the_approximation_joins_the_exact_test():
    differences = np.random.default_rng(2).normal(0.15, 1, MOST_EXACT)
    approximate = stats.wilcoxon(differences, correction=False, method="approx").pvalue
    assert wilcoxon(differences)[1] == pytest.approx(approximate, abs=2e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_smallest_p_is_reached_by_equal_signs(n: int):
    assert wilcoxon(np.arange(1, n + 1))[1] == pytest.approx(smallest_p(n))


@pytest.mark.parametrize("bad", [[], [0.1, float("nan")], [[0.1]]])
def test_what_is_no_list_of_differences_is_refused(bad: list):
    with pytest.raises(ValueError, match="difference"):
        wilcoxon(bad)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; the last may not fall below its
    # predecessor.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_rank_biserial_by_hand():
    # |d| ranks: 0.1 -> 1, 0.2 -> 2.5 twice, 0.4 -> 4; positive 1 + 2.5 + 4 = 7.5, negative 2.5; (7.5 - 2.5) / 10.
    assert rank_biserial([0.1, 0.2, -0.2, 0.4]) == pytest.approx(0.5)
    assert (rank_biserial([1, 2]), rank_biserial([-1, -2])) == (1.0, -1.0)


def test_cohens_dz_by_hand():
    # Mean 2, deviations -2, 0, 2, so the variance over n - 1 is 4.
    assert cohens_dz([0, 2, 4]) == pytest.approx(1.0)
    assert cohens_dz([0.5]) is None and cohens_dz([0.5, 0.5]) is None


def test_groups_are_averaged_whatever_their_order():
    assert means_by_group([1.0, 5.0, 3.0], ["b", "a", "b"]) == {"a": 5.0, "b": 2.0}
