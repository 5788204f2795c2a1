"""Splits: by patient, seeded, fair by the largest remainder, and never dealt twice."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from medsam_lora.errors import ManifestError
from medsam_lora.io.manifest import assign_splits, folds
from medsam_lora.io.splits import complete_fractions, splits_of_patients
from medsam_lora.records import CaseRecord


def cohort(n_patients: int, cases_each: int = 1) -> list[CaseRecord]:
    return [
        CaseRecord(f"p{p:03}-{c}", f"p{p:03}", "", {}, "brats2023", "")
        for p in range(n_patients)
        for c in range(cases_each)
    ]


def patients_by_split(records: list[CaseRecord]) -> dict[str, int]:
    assert all(len(splits) == 1 for splits in splits_of_patients(records).values())
    return dict(Counter({r.patient_id: r.split for r in records}.values()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.7, 0.15, 0.15)),
        ({"train": 0.8}, (0.8, 0.1, 0.1)),
        ({"train": 1}, (1.0, 0.0, 0.0)),
        # what is left, 0.75, is shared 0.7 to 0.15: 0.75 * 14/17 and 0.75 * 3/17
        ({"test": 0.25}, (0.75 * 14 / 17, 0.75 * 3 / 17, 0.25)),
        ({"val": 0.2, "test": 0.2}, (0.6, 0.2, 0.2)),
        ({"train": 0.5, "val": 0.25, "test": 0.25}, (0.5, 0.25, 0.25)),
        ({"train": 0.7, "val": 0.2, "test": 0.1}, (0.7, 0.2, 0.1)),  # sums to 0.9999999999999999
    ],
)
def test_shares_not_given_share_what_is_left(given: dict[str, float], expected: tuple[float, ...]) -> None:
    shares = complete_fractions(given)
    assert list(shares) == ["train", "val", "test"]
    assert tuple(shares.values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train": 0.7, "val": 0.2, "test": 0.2}, "sum to 1.1, not to 1"),
        ({"train": 0.2, "val": 0.2, "test": 0.2}, "sum to 0.6, not to 1"),
        ({"train": 0.8, "test": 0.8}, "sum to 1.6"),
        ({"train": 1.2}, "outside"),
        ({"val": -0.1}, "outside"),
        ({"val": math.nan}, "outside"),
        ({"dev": 0.1}, "unknown split 'dev'"),
    ],
)
def test_shares_that_cannot_be_are_one_clear_error(given: dict[str, float], words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        assign_splits(cohort(10), given, 0)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("n", "fractions", "expected"),
    [
        (20, {}, (14, 3, 3)),
        (8, {}, (6, 1, 1)),  # quotas 5.6, 1.2, 1.2
        (10, {}, (7, 2, 1)),  # quotas 7, 1.5, 1.5: the tie goes to val, the earlier
        (11, {}, (8, 2, 1)),  # quotas 7.7, 1.65, 1.65
        (3, {}, (1, 1, 1)),  # quotas 2.1, 0.45, 0.45 would leave one empty
        (4, {}, (2, 1, 1)),
        (2, {}, (2, 0, 0)),  # not enough for one each
        (1, {}, (1, 0, 0)),
        (100, {"train": 0.98, "val": 0.015, "test": 0.005}, (97, 2, 1)),  # quotas 98, 1.5, 0.5; test gets its one
        (7, {"train": 1.0}, (7, 0, 0)),
        (5, {"train": 0, "val": 0, "test": 1}, (0, 0, 5)),
    ],
)
def test_numbers_by_hand(n: int, fractions: dict[str, float], expected: tuple[int, int, int]) -> None:
    counts = patients_by_split(assign_splits(cohort(n), fractions, 3))
    assert tuple(counts.get(name, 0) for name in ("train", "val", "test")) == expected


def largest_remainder(n: int, shares: dict[str, float]) -> dict[str, int]:
    """Hamilton's method, written down plainly."""
    quotas = {name: round(n * share, 9) for name, share in shares.items()}
    seats = {name: math.floor(quota) for name, quota in quotas.items()}
    order = sorted(quotas, key=lambda name: -round(quotas[name] - seats[name], 9))  # stable: ties to the earlier
    for name in order[: n - sum(seats.values())]:
        seats[name] += 1
    return seats


def test_numbers_follow_the_largest_remainder_method() -> None:
    for n, (train, val) in itertools.product(range(12, 60), [(0.7, 0.15), (0.6, 0.3), (0.5, 0.25), (0.34, 0.33)]):
        shares = {"train": train, "val": val, "test": round(1 - train - val, 9)}
        expected = largest_remainder(n, shares)
        assert min(expected.values()) > 0
        counts = patients_by_split(assign_splits(cohort(n), shares, n))
        assert counts == expected, (n, shares)


def test_all_cases_of_a_patient_go_together_and_patients_are_what_is_counted() -> None:
    records = cohort(20, cases_each=3)
    dealt = assign_splits(records, {}, 0)
    assert [r.case_id for r in dealt] == [r.case_id for r in records]
    assert patients_by_split(dealt) == {"train": 14, "val": 3, "test": 3}


def test_the_order_of_the_records_changes_nothing_and_the_seed_does() -> None:
    records = cohort(30, cases_each=2)
    shuffled = records[:]
    random.Random(1).shuffle(shuffled)
    by_case = {r.case_id: r.split for r in assign_splits(records, {}, 5)}
    assert {r.case_id: r.split for r in assign_splits(shuffled, {}, 5)} == by_case
    assert {r.case_id: r.split for r in assign_splits(records, {}, 6)} != by_case
    assert len({tuple(r.split for r in assign_splits(records, {}, seed)) for seed in range(20)}) == 20


def test_known_patients_keep_their_split_and_new_ones_are_dealt_towards_the_shares() -> None:
    old = assign_splits(cohort(10), {}, 0)
    assert patients_by_split(old) == {"train": 7, "val": 2, "test": 1}
    grown = assign_splits([*old, *cohort(20)[10:]], {}, 99)
    assert [r.split for r in grown[:10]] == [r.split for r in old]
    assert patients_by_split(grown) == {"train": 14, "val": 3, "test": 3}


def test_a_new_case_of_a_known_patient_follows_the_patient() -> None:
    old = [replace(r, split="test") for r in cohort(1)]
    new = replace(old[0], case_id="p000-9", split="")
    assert [r.split for r in assign_splits([new, *old], {"train": 1.0}, 0)] == ["test", "test"]


def test_splits_that_are_over_full_get_no_one_new() -> None:
    old = [replace(r, split="val") for r in cohort(6)]
    grown = assign_splits([*old, *cohort(10)[6:]], {}, 0)
    # of 10 patients 7, 1.5, 1.5 are wanted; six stay in val, the four new ones fill the others
    assert patients_by_split(grown) == {"val": 6, "train": 3, "test": 1}


def test_dealing_again_changes_nothing() -> None:
    once = assign_splits(cohort(9), {}, 0)
    assert assign_splits(once, {"train": 0.1, "val": 0.1, "test": 0.8}, 7) == once


def test_a_patient_in_two_splits_is_refused() -> None:
    torn = [replace(r, split=split) for r, split in zip(cohort(1, 2), ("train", "test"), strict=True)]
    with pytest.raises(ManifestError, match="p000") as caught:
        assign_splits(torn, {}, 0)
    assert caught.value.code == "patient_in_two_splits"


def test_folds_score_every_case_once_and_never_a_patient_that_trained() -> None:
    records = cohort(8, cases_each=2)
    parts = folds(records, 4, seed=0)
    assert len(parts) == 4
    tested = Counter(r.case_id for part in parts for r in part if r.split == "test")
    assert tested == Counter({r.case_id: 1 for r in records})
    for part in parts:
        assert [r.case_id for r in part] == [r.case_id for r in records]
        assert patients_by_split(part) == {"train": 6, "test": 2}
    assert folds(records[::-1], 4, seed=0)[0][::-1] == parts[0]
    assert folds(records, 4, seed=1) != parts


def test_folds_of_unequal_size_differ_by_one_patient() -> None:
    sizes = sorted(patients_by_split(part)["test"] for part in folds(cohort(10), 4, seed=2))
    assert sizes == [2, 2, 3, 3]


@pytest.mark.parametrize("n", [0, 1, 9])
def test_an_impossible_number_of_folds_is_refused(n: int) -> None:
    with pytest.raises(ManifestError, match=f"{n} folds over 8 patients"):
        folds(cohort(8), n, seed=0)
