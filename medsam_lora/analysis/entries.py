"""The methods of several ``per_case.csv`` tables, each under a label of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medsam_lora.analysis.wording import PREDICTION_VOLUME, REFERENCE_VOLUME, SCORES, Score, method_name
from medsam_lora.errors import DataError

_FOLD = re.compile(r"/fold\d+$")
_TOLD_BY_FLOOR = (SCORES["dice"], REFERENCE_VOLUME, PREDICTION_VOLUME)


@dataclass(frozen=True)
class Entry:
    """One method, as one run scored it.

    Parameters
    ----------
    label : str
        Unique among the entries.
    method : str
        Its name in the table.
    path : Path
        The table.
    rows : tuple of mapping of str to str
        One per case and region.
    is_floor : bool
    """

    label: str
    method: str
    path: Path
    rows: tuple[Mapping[str, str], ...]
    is_floor: bool = False

    @property
    def regions(self) -> tuple[str, ...]:
        """Regions scored, in the order of the table."""
        return tuple(dict.fromkeys(row["region"] for row in self.rows))

    def of(self, region: str) -> dict[str, Mapping[str, str]]:
        """The rows of a region by case, in the order of the table."""
        return {row["case_id"]: row for row in self.rows if row["region"] == region}

    def has(self, column: str) -> bool:
        """Whether the table has a column."""
        return column in self.rows[0]

    def values_of(self, column: str) -> str:
        """What a column says, joined where rows differ; ``unknown`` where the table lacks it."""
        return ", ".join(dict.fromkeys(row.get(column, "") or "unknown" for row in self.rows))

    def number(self, row: Mapping[str, str], score: Score) -> float:
        """A score of a row.

        Raises
        ------
        DataError
            Where the cell is no finite number.
        """
        try:
            value = float(row[score.column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{row['region']} of {self.label} has no {score.column} (status {row['status']})",
                case_id=row["case_id"],
                path=self.path,
                remedy="Evaluate again, or compare another metric.",
            )
        return abs(value) if score.absolute else value


def failed(row: Mapping[str, str]) -> bool:
    """Whether a row stands for a prediction that is missing or could not be scored."""
    return row["status"] != "ok"


def gather(tables: Sequence[tuple[Path, Sequence[Mapping[str, str]]]], floor: str) -> list[Entry]:
    """Take tables apart into methods, and name them.

    Parameters
    ----------
    tables : sequence of (Path, rows)
        Each path once.
    floor : str
        Method name of the floor. Its equal rows in several tables become one entry, which comes last.

    Returns
    -------
    list of Entry
        In the order of the tables. Methods of one name are told apart by their runs or folders.

    Raises
    ------
    DataError
        Where a table has no rows, or a case twice; where floors contradict each other.
    """
    found: list[Entry] = []
    for path, rows in tables:
        if not rows:
            raise DataError("the table has no rows", path=path, remedy="Evaluate again.")
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            parts = [mine]
            if method != floor and _twice(mine) is not None:
                # One table of several runs of a method, joined by hand.
                runs = dict.fromkeys(_run(row) for row in mine)
                parts = [[row for row in mine if _run(row) == run] for run in runs]
            for part in parts:
                if (repeated := _twice(part)) is not None and method != floor:
                    raise DataError(
                        f"{method} has two rows of {repeated[1]}",
                        case_id=repeated[0],
                        path=path,
                        remedy="Keep one row per case, region and method.",
                    )
                found.append(Entry(method, method, path, tuple(part), method == floor))
    methods = [entry for entry in found if not entry.is_floor]
    floors = [entry for entry in found if entry.is_floor]
    return _told_apart(methods) + ([_one_floor(floors)] if floors else [])


def _twice(rows: Sequence[Mapping[str, str]]) -> tuple[str, str] | None:
    seen = set()
    for row in rows:
        key = (row["case_id"], row["region"])
        if key in seen:
            return key
        seen.add(key)
    return None


def _run(row: Mapping[str, str]) -> str:
    return _FOLD.sub("", row["run"])


def _one_floor(floors: Sequence[Entry]) -> Entry:
    """The floor of all tables: the boxes do not depend on the method, so that equal boxes give equal rows."""
    kept: dict[tuple[str, str], tuple[Entry, Mapping[str, str]]] = {}
    for entry in floors:
        for row in entry.rows:
            key = (row["case_id"], row["region"])
            first = kept.get(key)
            # Where a run predicted nothing of a case, its boxes are not known; another run's are.
            if first is None or (failed(first[1]) and not failed(row)):
                kept[key] = (entry, row)
            elif not failed(row) and not _equal_floors(first, (entry, row)):
                volumes = " and ".join(f"{e.number(r, PREDICTION_VOLUME):.3f} ml" for e, r in (first, (entry, row)))
                raise DataError(
                    f"the boxes differ: filled ({row['region']}), they hold {volumes} in {first[0].path} and here",
                    case_id=row["case_id"],
                    path=entry.path,
                    remedy="Predict all runs with the same boxes.",
                )
    return replace(floors[0], rows=tuple(row for _, row in kept.values()))


def _equal_floors(one: tuple[Entry, Mapping[str, str]], other: tuple[Entry, Mapping[str, str]]) -> bool:
    told = [[entry.number(row, score) for score in _TOLD_BY_FLOOR] for entry, row in (one, other)]
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(*told, strict=True))


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    labels: dict[int, str] = {}
    for method in dict.fromkeys(entry.method for entry in entries):
        group = [i for i, entry in enumerate(entries) if entry.method == method]
        labels |= dict(zip(group, _labels([entries[i] for i in group]), strict=True))
    # A label that another entry has, or is shown under, is told apart by its number; this hardly ever happens.
    taken = [method_name(label) for label in labels.values()]
    return [
        replace(entry, label=labels[i] if taken.count(method_name(labels[i])) == 1 else f"{labels[i]} #{i + 1}")
        for i, entry in enumerate(entries)
    ]


def _labels(group: Sequence[Entry]) -> list[str]:
    """Labels of entries of one method: its name where it is alone, else with what tells the runs apart."""
    if len(group) == 1:
        return [group[0].method]
    runs = [", ".join(dict.fromkeys(_run(row) for row in entry.rows)) for entry in group]
    if len(set(runs)) == len(runs):
        return [run if group[0].method in run else f"{group[0].method} ({run})" for run in runs]
    parts = [entry.path.resolve().parent.parts for entry in group]
    while len({p[:1] for p in parts}) == 1 and all(parts):
        parts = [p[1:] for p in parts]
    while len({p[-1:] for p in parts}) == 1 and all(parts):
        parts = [p[:-1] for p in parts]
    return [f"{group[0].method} ({'/'.join(p) or entry.path.name})" for p, entry in zip(parts, group, strict=True)]
