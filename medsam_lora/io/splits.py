"""Dealing patients to train, val and test: by patient, seeded, and once."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from medsam_lora.errors import ManifestError
from medsam_lora.records import CaseRecord

SPLITS: Final = ("train", "val", "test")

DEFAULT_FRACTIONS: Final[Mapping[str, float]] = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Shares of the patients where none are asked for."""

_log = logging.getLogger(__name__)


def complete_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    """Shares of all three splits, from those given.

    What is not given shares what is left in the proportion of `DEFAULT_FRACTIONS`.

    Raises
    ------
    ManifestError
        Where a split is unknown, a share is outside [0, 1], or the shares cannot sum to 1.

    Examples
    --------
    >>> complete_fractions({"train": 0.8})
    {'train': 0.8, 'val': 0.1, 'test': 0.1}
    >>> complete_fractions({"train": 0.5, "test": 0.5})
    {'train': 0.5, 'val': 0.0, 'test': 0.5}
    """
    given = ", ".join(f"{name} {share:g}" for name, share in fractions.items())
    remedy = "Give shares in [0, 1] that sum to 1, such as train 0.7, val 0.15, test 0.15."
    unknown = [name for name in fractions if name not in SPLITS]
    if unknown:
        raise ManifestError(f"unknown split {unknown[0]!r}", remedy=f"Use {', '.join(SPLITS)}.")
    if any(not 0 <= share <= 1 for share in fractions.values()):
        raise ManifestError(f"a share is outside [0, 1] ({given})", remedy=remedy)
    left = 1 - math.fsum(fractions.values())
    absent = {name: share for name, share in DEFAULT_FRACTIONS.items() if name not in fractions}
    if left < -1e-6 or (not absent and left > 1e-6):
        raise ManifestError(f"the shares sum to {1 - left:g}, not to 1 ({given})", remedy=remedy)
    total = math.fsum(absent.values())
    shared = {name: round(max(left, 0.0) * share / total, 12) for name, share in absent.items()}
    return {name: float(fractions[name]) if name in fractions else shared[name] for name in SPLITS}


def assign_splits(records: Sequence[CaseRecord], fractions: Mapping[str, float], seed: int) -> list[CaseRecord]:
    """Deal the patients that have no split yet.

    Parameters
    ----------
    records : sequence of CaseRecord
        In any order; a patient of whom one case has a split keeps it for all cases.
    fractions : mapping of str to float
        As for `complete_fractions`.
    seed : int

    Returns
    -------
    list of CaseRecord
        In the order given, each with a split. The numbers of patients follow the largest-remainder method over all
        patients, old and new; every split with a share above 0 gets a patient where there are enough of them.

    Raises
    ------
    ManifestError
        Where `fractions` are unusable, or a patient already is in two splits.
    """
    shares = complete_fractions(fractions)
    split_of = _known_splits(records)
    patients = sorted({record.patient_id for record in records})
    new = [patient for patient in patients if patient not in split_of]
    counts = {name: sum(split == name for split in split_of.values()) for name in SPLITS}
    seats = _seats(shares, counts, len(new))
    order = [new[i] for i in np.random.default_rng(seed).permutation(len(new))]
    for name in SPLITS:
        dealt, order = order[: seats[name]], order[seats[name] :]
        split_of |= dict.fromkeys(dealt, name)
    empty = [name for name in SPLITS if shares[name] > 0 and counts[name] + seats[name] == 0]
    if empty and patients:
        _log.warning("too few patients (%d): the split %s stays empty", len(patients), " and ".join(empty))
    return [replace(record, split=split_of[record.patient_id]) for record in records]


def folds(records: Sequence[CaseRecord], n: int, seed: int) -> list[list[CaseRecord]]:
    """Cross-validation over patients: every case is in the test split of exactly one fold.

    Parameters
    ----------
    records : sequence of CaseRecord
        Their own splits are ignored.
    n : int
        Number of folds, from 2 to the number of patients.
    seed : int

    Returns
    -------
    list of list of CaseRecord
        Of length `n`; all the cases, each with the split ``train`` or ``test``.

    Raises
    ------
    ManifestError
        Where `n` is out of range.
    """
    patients = sorted({record.patient_id for record in records})
    if not 2 <= n <= len(patients):
        raise ManifestError(
            f"{n} folds over {len(patients)} patients", remedy="Ask for at least 2 folds and at most one per patient."
        )
    order = np.random.default_rng(seed).permutation(len(patients))
    fold_of = {patients[index]: position % n for position, index in enumerate(order)}
    return [
        [replace(record, split="test" if fold_of[record.patient_id] == fold else "train") for record in records]
        for fold in range(n)
    ]


def splits_of_patients(records: Sequence[CaseRecord]) -> dict[str, dict[str, list[str]]]:
    """For every patient, the splits its cases are in, and those cases; cases without a split are left out."""
    found: dict[str, dict[str, list[str]]] = {}
    for record in records:
        if record.split:
            found.setdefault(record.patient_id, {}).setdefault(record.split, []).append(record.case_id)
    return found


def _known_splits(records: Sequence[CaseRecord]) -> dict[str, str]:
    found = splits_of_patients(records)
    torn = [f"{patient} ({' and '.join(splits)})" for patient, splits in found.items() if len(splits) > 1]
    if torn:
        raise ManifestError(
            f"patients in two splits: {', '.join(torn)}",
            remedy="Put all cases of a patient into one split.",
            code="patient_in_two_splits",
        )
    return {patient: next(iter(splits)) for patient, splits in found.items()}


def _seats(shares: Mapping[str, float], counts: Mapping[str, int], new: int) -> dict[str, int]:
    """How many of the `new` patients go to each split that holds `counts` already."""
    total = sum(counts.values()) + new
    seats = dict.fromkeys(SPLITS, 0)

    def lacking(name: str) -> float:
        return shares[name] * total - counts[name] - seats[name]

    # One seat at a time to the split furthest below its quota: with no one seated before, this is the
    # largest-remainder method. Rounding keeps 0.15 * 20 and 3 equal, so that ties go by the order of the splits.
    for _ in range(new):
        seats[max((name for name in SPLITS if shares[name] > 0), key=lambda name: round(lacking(name), 9))] += 1
    asked = [name for name in SPLITS if shares[name] > 0]
    if total < len(asked):
        return seats
    for name in asked:
        if counts[name] + seats[name] == 0:
            # Only a new patient may move, from the split that keeps the most, and never the last one of it.
            donor = max((d for d in asked if seats[d]), key=lambda d: counts[d] + seats[d], default=None)
            if donor is not None and counts[donor] + seats[donor] > 1:
                seats[donor] -= 1
                seats[name] += 1
    return seats
