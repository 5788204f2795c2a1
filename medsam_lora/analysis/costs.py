"""What runs cost beside what they score, and runs that differ in nothing but their seed taken together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Final

import numpy as np

from medsam_lora.analysis.entries import Entry
from medsam_lora.analysis.statistics import bootstrap_mean
from medsam_lora.analysis.wording import SCORES

SEED: Final = "train.seed"
COSTS: Final = ("trainable_parameters", "peak_memory_mib", "train_seconds", "seconds_per_step")
"""What a run is known to have cost, as in its ``run.json``."""

_BEFORE_SEED = re.compile(r"[\W_]*(train\.)?(seed|s)?[\W_]*$")


@dataclass(frozen=True)
class Facts:
    """What stands beside the table of a run.

    Parameters
    ----------
    settings : mapping of str to object
        ``section.key`` to value; empty where they are not known.
    costs : mapping of str to float
        By `COSTS`, what is known. With folds, of one training: the mean, of memory the largest.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed; mostly a single one.

    Parameters
    ----------
    label : str
    entries : tuple of Entry
    facts : tuple of Facts
        One for each entry.
    """

    label: str
    entries: tuple[Entry, ...]
    facts: tuple[Facts, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of all its runs, but for the seed."""
        return self.facts[0].settings

    def cost(self, name: str) -> float | None:
        """The mean over the runs, of memory the largest; None where it is not known of all."""
        found = [facts.costs.get(name) for facts in self.facts]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return None
        return of_all(name, known)

    def scores(self, region: str) -> tuple[list[float], list[str]]:
        """Dice per case, its mean over the seeds, and the patient of each case."""
        tables = [entry.of(region) for entry in self.entries]
        dice = SCORES["dice"]
        cases = [case for case in tables[0] if all(case in table for table in tables)]
        values = [
            float(np.mean([entry.number(table[case], dice) for entry, table in zip(self.entries, tables, strict=True)]))
            for case in cases
        ]
        return values, [tables[0][case]["patient_id"] for case in cases]

    def seed_means(self, region: str) -> list[float]:
        """The mean Dice of each run."""
        dice = SCORES["dice"]
        return [float(np.mean([e.number(row, dice) for row in e.of(region).values()])) for e in self.entries]


def of_all(name: str, values: Sequence[float]) -> float:
    """A cost of several runs or folds: the mean, of memory the largest; a count that all share stays a whole number."""
    if name == "peak_memory_mib" or len(set(values)) == 1:
        return max(values)
    return sum(values) / len(values)


def seed_groups(entries: Sequence[Entry], facts: Mapping[str, Facts]) -> list[Group]:
    """Entries taken together where their settings are known and equal but for the seed.

    Parameters
    ----------
    entries : sequence of Entry
    facts : mapping of str to Facts
        By label; entries without facts stay alone.

    Returns
    -------
    list of Group
        In the order of their first entries.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        settings = facts.get(entry.label, Facts()).settings
        others = sorted((key, repr(value)) for key, value in settings.items() if key != SEED)
        found.setdefault(repr(others) if settings and not entry.is_floor else entry.label, []).append(entry)
    groups = []
    for members in found.values():
        own = tuple(facts.get(entry.label, Facts()) for entry in members)
        # The same seed twice is no second seed: such runs stay apart.
        seeds = [one.settings.get(SEED) for one in own]
        if len(members) > 1 and len(set(seeds)) == len(seeds):
            groups.append(Group(_common([entry.label for entry in members]), tuple(members), own))
        else:
            groups += [Group(entry.label, (entry,), (one,)) for entry, one in zip(members, own, strict=True)]
    place = {entry.label: i for i, entry in enumerate(entries)}
    return sorted(groups, key=lambda group: place[group.entries[0].label])


def run_rows(entries: Sequence[Entry], facts: Mapping[str, Facts], bootstrap: int, seed: int) -> list[dict[str, Any]]:
    """Rows of ``runs.csv``: every run and region, with the mean Dice, its interval over patients, and the costs.

    Parameters
    ----------
    entries : sequence of Entry
    facts : mapping of str to Facts
    bootstrap, seed : int
        As in `statistics.bootstrap_mean`.
    """
    rows = []
    for entry in entries:
        own = facts.get(entry.label, Facts())
        group = Group(entry.label, (entry,), (own,))
        for region in entry.regions:
            row = {"method": entry.label, "region": region, "seed": own.settings.get(SEED)}
            rows.append(row | _interval(group, region, bootstrap, seed) | {name: group.cost(name) for name in COSTS})
    return rows


def seed_rows(groups: Sequence[Group], bootstrap: int, seed: int) -> list[dict[str, Any]]:
    """Rows of ``seeds.csv``: the groups of several runs, with two spreads that are told apart.

    The interval is over patients, of the means over seeds, and says how much the cases vary. The standard deviation,
    smallest and largest are over seeds, of the means over cases, and say how much training varies.

    Parameters
    ----------
    groups : sequence of Group
    bootstrap, seed : int
        As in `statistics.bootstrap_mean`.
    """
    rows = []
    for group in groups:
        if len(group.entries) < 2:
            continue
        for region in group.entries[0].regions:
            means = group.seed_means(region)
            rows.append(
                {"method": group.label, "region": region, "n_seeds": len(means)}
                | _interval(group, region, bootstrap, seed)
                | {
                    "seed_sd": float(np.std(means, ddof=1)),
                    "seed_low": min(means),
                    "seed_high": max(means),
                    "runs": " ".join(entry.label for entry in group.entries),
                }
                | {name: group.cost(name) for name in COSTS}
            )
    return rows


def _interval(group: Group, region: str, bootstrap: int, seed: int) -> dict[str, Any]:
    values, patients = group.scores(region)
    mean, low, high = bootstrap_mean(values, patients, bootstrap, seed)
    return {"n_cases": len(values), "dice_mean": mean, "dice_low": low, "dice_high": high}


def _common(labels: Sequence[str]) -> str:
    """What labels of runs of several seeds have in common.

    Examples
    --------
    >>> _common(["rank=4,seed=0", "rank=4,seed=1"]), _common(["lora_s0", "lora_s1"]), _common(["one", "two"])
    ('rank=4', 'lora', 'one')
    >>> _common(["lora (a, seed=0)", "lora (a, seed=1)"])
    'lora (a)'
    """
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    label = _BEFORE_SEED.sub("", "".join(letters[0] for letters in same)) or labels[0]
    return label + ")" * (label.count("(") - label.count(")"))
