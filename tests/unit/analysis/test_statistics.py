"""The bootstrap against a slow one that copies patients, and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.analysis.statistics import bootstrap_mean, summarise


def slow_bootstrap(values: list[float], groups: list[str], n: int, seed: int) -> tuple[float, float, float]:
    """Draw patients one by one and average a list of all their cases."""
    patients = sorted(set(groups))
    rng = np.random.default_rng(seed)
    means = []
    for draw in rng.integers(len(patients), size=(n, len(patients))):
        cases = [v for p in draw for v, g in zip(values, groups, strict=True) if g == patients[p]]
        means.append(sum(cases) / len(cases))
    means.sort()

    def quantile(q: float) -> float:  # linear between order statistics
        position = q * (n - 1)
        below = int(position)
        above = min(below + 1, n - 1)
        return means[below] + (position - below) * (means[above] - means[below])

    return sum(values) / len(values), quantile(0.025), quantile(0.975)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_equals_the_slow_oracle(seed: int):
    rng = np.random.default_rng(100 + seed)
    values = rng.random(17).tolist()
    groups = [f"p{i}" for i in rng.integers(6, size=17)]
    assert bootstrap_mean(values, groups, 300, seed) == pytest.approx(slow_bootstrap(values, groups, 300, seed))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.0])
def test_equal_scores_have_no_interval(value: float):
    expected = pytest.approx((value, value, value), abs=1e-15)
    assert bootstrap_mean([value] * 7, list("aabbcde"), 200, 0) == expected


def test_a_single_patient_has_no_interval():
    assert bootstrap_mean([0.2, 0.8], ["a", "a"], 100, 0) == (0.5, 0.5, 0.5)


def test_two_patients_give_the_extremes():
    # Means of a resample of {0, 1}: 0, 1/2 or 1 with odds 1:2:1, so the 2.5 % tails are 0 and 1.
    assert bootstrap_mean([0.0, 1.0], ["a", "b"], 2000, 0) == (0.5, 0.0, 1.0)


def test_large_sample_approaches_the_normal_interval():
    rng = np.random.default_rng(11)
    values = rng.normal(0.7, 0.1, 400)
    mean, low, high = bootstrap_mean(values, range(400), 4000, 0)
    error = values.std() / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (low - mean) / error == pytest.approx(-1.96, abs=0.12)
    assert (high - mean) / error == pytest.approx(1.96, abs=0.12)


def test_patients_and_not_cases_are_resampled():
    # Four copies of each patient's score must not make the interval narrower.
    scores, patients = [0.1, 0.5, 0.6, 0.9], list("abcd")
    alone = bootstrap_mean(scores, patients, 500, 3)
    copies = bootstrap_mean(scores * 4, patients * 4, 500, 3)
    assert copies == pytest.approx(alone)
    as_if_independent = bootstrap_mean(scores * 4, range(16), 500, 3)
    assert as_if_independent[2] - as_if_independent[1] < 0.7 * (alone[2] - alone[1])


def test_order_of_rows_does_not_matter():
    values, groups = [0.1, 0.4, 0.8, 0.3, 0.9], list("abacb")
    order = [3, 0, 4, 2, 1]
    shuffled = bootstrap_mean([values[i] for i in order], [groups[i] for i in order], 200, 5)
    assert shuffled == pytest.approx(bootstrap_mean(values, groups, 200, 5))


def test_seed_decides_and_the_global_generator_is_untouched():
    values, groups = [0.1, 0.4, 0.8, 0.35, 0.9], list("abcde")
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first = bootstrap_mean(values, groups, 100, 0)
    assert first == bootstrap_mean(values, groups, 100, 0)
    assert first[1:] != bootstrap_mean(values, groups, 100, 1)[1:]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@pytest.mark.parametrize(
    ("values", "groups", "n"),
    [([], [], 10), ([0.5], ["a", "b"], 10), ([0.5, float("nan")], ["a", "b"], 10), ([0.5, 0.4], ["a", "b"], 0)],
)
def test_unusable_input_is_refused(values: list[float], groups: list[str], n: int):
    with pytest.raises(ValueError):
        bootstrap_mean(values, groups, n, 0)


def test_summary_is_by_method_and_region_and_keeps_failed_rows():
    def row(method: str, region: str, patient: str, dice: float, status: str = "ok") -> dict:
        return {"method": method, "region": region, "patient_id": patient, "dice": dice, "status": status}

    table = summarise(
        [
            row("lora", "WT", "a", 0.8),
            row("lora", "WT", "b", 0.0, "missing"),
            row("filled_box", "WT", "a", 0.7),
            row("lora", "TC", "a", 0.5),
        ],
        200,
        0,
    )
    assert [(r["method"], r["region"], r["n_cases"], r["dice_mean"]) for r in table] == [
        ("lora", "WT", 2, 0.4),
        ("filled_box", "WT", 1, 0.7),
        ("lora", "TC", 1, 0.5),
    ]
    assert (table[0]["dice_low"], table[0]["dice_high"]) == (0.0, 0.8)
