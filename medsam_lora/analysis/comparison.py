"""Comparing methods pair by pair: what must be equal first, and what the paired differences say.

The unit of evidence is the patient. Means and medians are over cases; the bootstrap resamples patients; the
signed-rank test and the effect sizes take one mean difference per patient; wins count cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from medsam_lora.analysis import paired
from medsam_lora.analysis.entries import Entry, failed
from medsam_lora.analysis.statistics import bootstrap_mean
from medsam_lora.analysis.wording import REFERENCE_VOLUME, SCORES, Score
from medsam_lora.errors import ConfigError, DataError, nearest

LEVEL: Final = 0.05
"""A difference is called one where its corrected p-value is not above this and its interval leaves out 0."""

METHODS, FLOOR = "methods", "floor"
"""The families of comparisons; p-values are corrected within a family and metric."""

BETTER, WORSE = "better", "worse"
NOT_CONFIRMED = "not confirmed"
NOT_SHOWN = "no difference shown"
IDENTICAL = "identical"

Pair = tuple[str, Entry, Entry]
"""A family, a method, and the baseline that it is compared with."""


def choose_scores(entries: Sequence[Entry], names: Sequence[str] | None) -> list[Score]:
    """The scores to compare.

    Parameters
    ----------
    entries : sequence of Entry
    names : sequence of str or None
        Columns of ``per_case.csv``. None: Dice, and where every entry has a challenge its lesion-wise Dice and HD95.

    Raises
    ------
    ConfigError
        Where a name is no score, or a table lacks its column.
    """
    if names is None:
        challenge = ["lesionwise_dice", "hd95_mm"] if all(entry.has("challenge") for entry in entries) else []
        names = ["dice", *challenge]
    chosen = []
    for name in dict.fromkeys(names):
        if name not in SCORES:
            guess = nearest(name, list(SCORES))
            hint = f"Did you mean {guess}?" if guess else f"Choose among {', '.join(SCORES)}."
            raise ConfigError(f"{name} is no score that can be better or worse", remedy=hint)
        absent = next((entry for entry in entries if not entry.has(name)), None)
        if absent is not None:
            remedy = "Evaluate with --challenge, or leave the metric out."
            raise ConfigError(
                f"metric definitions differ: {absent.label} has no column {name}"
                if any(entry.has(name) for entry in entries)
                else f"no table has the column {name}",
                path=absent.path,
                remedy=remedy if SCORES[name].of_challenge else "Evaluate again, or leave the metric out.",
            )
        chosen.append(SCORES[name])
    return chosen


def check_comparable(entries: Sequence[Entry], scores: Sequence[Score]) -> None:
    """Refuse entries that were not scored on the same cases, prompts, regions, references and definitions.

    Parameters
    ----------
    entries : sequence of Entry
        Each is held against the first. The floor may lack regions.
    scores : sequence of Score

    Raises
    ------
    DataError
        Naming what differs, in which cases, and the remedy.
    """
    first = entries[0]
    for entry in entries[1:]:
        if not (entry.is_floor or first.is_floor) and set(entry.regions) != set(first.regions):
            both = f"{first.label} has {', '.join(first.regions)}, {entry.label} has {', '.join(entry.regions)}"
            raise _refusal(
                entry,
                f"the regions differ: {both}",
                "Compare runs that were trained for, and evaluated on, the same regions.",
            )
        for region in first.regions:
            if region in entry.regions:
                _check_cases(first, entry, region)
        if any(score.of_challenge for score in scores):
            ours, theirs = first.values_of("challenge"), entry.values_of("challenge")
            if ours != theirs:
                raise _refusal(
                    entry,
                    f"the metric definitions differ: {first.label} was scored as {ours}, {entry.label} as {theirs}",
                    "Evaluate both with the same --challenge, or compare --metric dice.",
                )


def _check_cases(first: Entry, entry: Entry, region: str) -> None:
    ours, theirs = first.of(region), entry.of(region)
    if ours.keys() != theirs.keys():
        lacking = [
            f"{len(cases)} only in {label} ({_some(cases)})"
            for label, cases in (
                (first.label, [case for case in ours if case not in theirs]),
                (entry.label, [case for case in theirs if case not in ours]),
            )
            if cases
        ]
        raise _refusal(
            entry, f"the case lists differ for {region}: {'; '.join(lacking)}", "Evaluate both on the same cases."
        )
    for column, what, remedy in (
        ("patient_id", "patients", "Evaluate both with the same manifest."),
        ("prompt_source", "prompt sources", "Predict both with the same prompts."),
    ):
        apart = [case for case in ours if ours[case][column] != theirs[case][column]]
        if apart:
            values = f"{ours[apart[0]][column]!r} in {first.label}, {theirs[apart[0]][column]!r} in {entry.label}"
            raise _refusal(entry, f"the {what} differ for {_some(apart)}: {values}", remedy)
    for case, row in ours.items():
        volumes = [e.number(r, REFERENCE_VOLUME) for e, r in ((first, row), (entry, theirs[case]))]
        if not math.isclose(*volumes, rel_tol=1e-6, abs_tol=1e-6):
            values = f"{volumes[0]:.3f} ml in {first.label}, {volumes[1]:.3f} ml in {entry.label}"
            raise _refusal(
                entry,
                f"the references differ for {case}: {region} has {values}",
                "Evaluate both against the same label files.",
            )


def _refusal(entry: Entry, message: str, remedy: str) -> DataError:
    return DataError(f"these runs cannot be compared: {message}", path=entry.path, remedy=remedy)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def pairs_of(entries: Sequence[Entry], all_pairs: bool = False) -> list[Pair]:
    """Who is compared with whom.

    Parameters
    ----------
    entries : sequence of Entry
        The baseline first.
    all_pairs : bool
        Every method with every earlier one instead of with the baseline alone.

    Returns
    -------
    list of Pair
        Methods with their baselines; then every method with the floor, where there is one.
    """
    methods = [entry for entry in entries if not entry.is_floor]
    floors = [entry for entry in entries if entry.is_floor]
    baselines = methods if all_pairs else methods[:1]
    if entries[0].is_floor and not all_pairs:
        baselines = []
    between = [(METHODS, method, baseline) for i, baseline in enumerate(baselines) for method in methods[i + 1 :]]
    return between + [(FLOOR, method, floor) for floor in floors for method in methods]


def compare_pairs(pairs: Sequence[Pair], scores: Sequence[Score], n: int = 2000, seed: int = 0) -> list[dict[str, Any]]:
    """Compare every pair in every region and score.

    Parameters
    ----------
    pairs : sequence of Pair
        Of entries that `check_comparable` let pass.
    scores : sequence of Score
    n, seed : int
        Resamples and seed of the bootstrap.

    Returns
    -------
    list of dict
        Rows of ``statistics.csv``, by family, score, pair and region. A difference is method minus baseline in the
        score's own unit; wins and the verdict know which way is better.
    """
    rows = []
    for family in dict.fromkeys(family for family, _, _ in pairs):
        for score in scores:
            block = [
                _compare(method, baseline, region, score, n, seed)
                for of, method, baseline in pairs
                if of == family
                for region in method.regions
                if region in baseline.regions
            ]
            for row, p_holm in zip(block, paired.holm([row["p_value"] for row in block]), strict=True):
                row |= {"family": family, "n_comparisons": len(block), "p_holm": p_holm}
                row["verdict"] = _verdict(row, score)
            rows += block
    return rows


def _compare(method: Entry, baseline: Entry, region: str, score: Score, n: int, seed: int) -> dict[str, Any]:
    mine, theirs = method.of(region), baseline.of(region)
    ours = np.array([method.number(mine[case], score) for case in mine])
    others = np.array([baseline.number(theirs[case], score) for case in mine])
    patients = [mine[case]["patient_id"] for case in mine]
    gaps = ours - others
    by_patient = list(paired.means_by_group(gaps, patients).values())
    mean, low, high = bootstrap_mean(gaps, patients, n, seed)
    # One patient says nothing of others: an interval of no width would claim certainty.
    alone = len(by_patient) == 1
    statistic, p_value = paired.wilcoxon(by_patient)
    wins, ties, losses = paired.win_tie_loss(gaps, score.higher_is_better)
    return {
        "metric": score.column,
        "better": score.better,
        "region": region,
        "method": method.label,
        "baseline": baseline.label,
        "n_cases": len(mine),
        "n_patients": len(by_patient),
        "n_failed": sum(map(failed, mine.values())),
        "baseline_n_failed": sum(map(failed, theirs.values())),
        "mean": float(ours.mean()),
        "baseline_mean": float(others.mean()),
        "median": float(np.median(ours)),
        "baseline_median": float(np.median(others)),
        "mean_difference": mean,
        "difference_low": None if alone else low,
        "difference_high": None if alone else high,
        "median_difference": float(np.median(gaps)),
        "wilcoxon_statistic": statistic,
        "p_value": p_value,
        "rank_biserial": paired.rank_biserial(by_patient),
        "cohens_dz": paired.cohens_dz(by_patient),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "postprocess": method.values_of("postprocess"),
        "baseline_postprocess": baseline.values_of("postprocess"),
    }


def _verdict(row: Mapping[str, Any], score: Score) -> str:
    if row["ties"] == row["n_cases"]:
        return IDENTICAL
    low, high = row["difference_low"], row["difference_high"]
    if low is not None and low <= 0 <= high:
        return NOT_SHOWN
    if low is None or row["p_holm"] > LEVEL:
        return NOT_CONFIRMED
    return BETTER if (low > 0) == score.higher_is_better else WORSE


def per_patient(entries: Sequence[Entry], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Means over the cases of each patient.

    Parameters
    ----------
    entries : sequence of Entry
    scores : sequence of Score

    Returns
    -------
    list of dict
        Rows of ``per_patient.csv``: by entry and region, patients in alphabetical order.
    """
    table = []
    for entry in entries:
        for region in entry.regions:
            rows = list(entry.of(region).values())
            patients = [row["patient_id"] for row in rows]
            means = {
                score.column: paired.means_by_group([entry.number(row, score) for row in rows], patients)
                for score in scores
            }
            for patient in sorted(set(patients)):
                mine = [row for row in rows if row["patient_id"] == patient]
                table.append(
                    {
                        "patient_id": patient,
                        "method": entry.label,
                        "region": region,
                        "n_cases": len(mine),
                        "n_failed": sum(map(failed, mine)),
                        **{column: values[patient] for column, values in means.items()},
                    }
                )
    return table
