"""What a run is to the report: its scores, its curves, its records and its predictions, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from medsam_lora.errors import DataError
from medsam_lora.io.files import sha256_of
from medsam_lora.io.predictions import RECORD_NAME
from medsam_lora.io.tables import SUMMARY_COLUMNS, read_table

SCORES: Final = "per_case.csv"
LOG: Final = "log.csv"
SETTINGS: Final = "config.yaml"
TRAINING_RECORD: Final = "run.json"

NEEDED: Final = ("case_id", "patient_id", "method", "region", "dice", "prompt_source", "status")
"""Columns of ``per_case.csv`` without which there is no report; the others are shown where they are."""

_REMEDY = (
    "Give the folder of a pipeline, of one of its runs, or one with per_case.csv; score first where there is none."
)


@dataclass(frozen=True)
class Source:
    """A file that numbers of the report come from.

    Parameters
    ----------
    key : str
        Short name, by which a number of the page names the file.
    path : Path
    sha256 : str
    """

    key: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class Row:
    """A line of a ``per_case.csv``.

    Parameters
    ----------
    source : str
        Key of the file.
    line : int
        Of the data lines, from 1.
    cells : mapping of str to str
        As in the file.
    """

    source: str
    line: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def number(self, column: str) -> float | None:
        """The number in a cell, or None where the cell is empty or the file has no such column."""
        text = self.cells.get(column, "")
        return float(text) if text else None


@dataclass(frozen=True)
class Record:
    """A JSON record that a stage left.

    Parameters
    ----------
    path : Path
    part : str
        The fold it belongs to, empty without folds.
    data : mapping
    """

    path: Path
    part: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One method as it was scored.

    Parameters
    ----------
    label : str
        Its name in the report, unique in it.
    method : str
        Its name in ``per_case.csv``.
    folder : Path
    rows : tuple of Row
    log : tuple of mapping
        Lines of ``log.csv``; empty where nothing was trained.
    training, prediction : tuple of Record
        One per fold.
    predictions : tuple of Path
        Folders with ``<case_id>.nii.gz``.
    settings : str
        ``config.yaml`` as it stands, or empty.
    """

    label: str
    method: str
    folder: Path
    rows: tuple[Row, ...]
    log: tuple[Mapping[str, str], ...] = ()
    training: tuple[Record, ...] = ()
    prediction: tuple[Record, ...] = ()
    predictions: tuple[Path, ...] = ()
    settings: str = ""

    @property
    def regions(self) -> tuple[str, ...]:
        """Regions scored, in the order of the file."""
        return tuple(dict.fromkeys(row["region"] for row in self.rows))


def collect(paths: Sequence[Path], floor: str) -> tuple[list[Run], list[Source]]:
    """Read runs.

    Parameters
    ----------
    paths : sequence of Path
        Pipeline folders (every method that their ``summary.csv`` lists), run folders, or folders with ``per_case.csv``.
    floor : str
        Method name of the floor. It comes first; floors that are equal come once.

    Returns
    -------
    runs : list of Run
    sources : list of Source
        The ``per_case.csv`` of the runs.

    Raises
    ------
    DataError
        Where a path holds no scores.
    """
    sources: list[Source] = []
    runs: list[Run] = []
    seen: set[Path] = set()
    for folder in [folder for path in paths for folder in _run_folders(path, floor)]:
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        source = Source(f"s{len(sources)}", folder / SCORES, sha256_of(folder / SCORES))
        sources.append(source)
        runs += _runs_of(folder, source, floor)
    runs = _without_equal_floors(runs, floor)
    ordered = [r for r in runs if r.method == floor] + [r for r in runs if r.method != floor]
    used = {row.source for run in ordered for row in run.rows}
    return _told_apart(ordered), [source for source in sources if source.key in used]


def _run_folders(path: Path, floor: str) -> Iterator[Path]:
    if path.is_file() and path.name == SCORES:
        path = path.parent
    if not path.is_dir():
        raise DataError("no such folder", path=path, remedy=_REMEDY)
    if (path / SCORES).is_file():
        # A run of a pipeline has its floor beside it.
        beside = path.parent / floor
        if path.parent.name == "runs" and (beside / SCORES).is_file():
            yield beside
        yield path
        return
    if not (path / "summary.csv").is_file():
        raise DataError(f"there are no scores here (no {SCORES}, no summary.csv)", path=path, remedy=_REMEDY)
    summary = read_table(path / "summary.csv", SUMMARY_COLUMNS, DataError)
    for method in dict.fromkeys(row["method"] for row in summary):
        if not (path / "runs" / method / SCORES).is_file():
            raise DataError("summary.csv lists a method that has no scores", path=path / "runs" / method / SCORES)
        yield path / "runs" / method


def _runs_of(folder: Path, source: Source, floor: str) -> list[Run]:
    lines = read_table(source.path, NEEDED, DataError)
    if not lines:
        raise DataError("the table has no rows", path=source.path, remedy="Evaluate again.")
    rows = [Row(source.key, i, cells) for i, cells in enumerate(lines, 1)]
    runs = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = tuple(row for row in rows if row["method"] == method)
        _check_numbers(mine, source.path)
        runs.append(Run(method, method, folder, mine))
    # What else lies in the folder belongs to its one method; a table of several methods has none of its own.
    owners = [run for run in runs if run.method != floor]
    return [_with_artefacts(run) if [run] == owners else run for run in runs]


def _check_numbers(rows: Sequence[Row], path: Path) -> None:
    for row in rows:
        try:
            if row.number("dice") is None:
                raise ValueError("no Dice")
        except ValueError as error:
            raise DataError(
                f"data line {row.line}: {error}", case_id=row["case_id"], path=path, remedy="Evaluate again."
            ) from error


def _with_artefacts(run: Run) -> Run:
    folder = run.folder
    parts = [("", folder)]
    fold = 0
    while (folder / f"fold{fold}").is_dir():
        parts.append((f"fold{fold}", folder / f"fold{fold}"))
        fold += 1
    homes = [(part, home / "predictions") for part, home in parts if (home / "predictions").is_dir()]
    # Scores that `evaluate` wrote elsewhere say where the predictions were.
    homes = homes or [("", home) for home in _scored_folders(folder / "summary.json")]
    return replace(
        run,
        log=tuple(read_table(folder / LOG, ("epoch",), DataError)) if (folder / LOG).is_file() else (),
        training=_records([(part, home / TRAINING_RECORD) for part, home in parts]),
        prediction=_records([(part, home / RECORD_NAME) for part, home in homes]),
        predictions=tuple(home for _, home in homes),
        settings=(folder / SETTINGS).read_text(encoding="utf-8") if (folder / SETTINGS).is_file() else "",
    )


def _scored_folders(summary: Path) -> list[Path]:
    if not summary.is_file():
        return []
    entries = read_json(summary).get("metric_per_case", [])
    folders = dict.fromkeys(Path(str(entry["prediction_file"])).parent for entry in entries)
    return [folder for folder in folders if folder.is_dir()]


def _records(paths: Sequence[tuple[str, Path]]) -> tuple[Record, ...]:
    return tuple(Record(path, part, read_json(path)) for part, path in paths if path.is_file())


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object.

    Raises
    ------
    DataError
        Where the file holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise DataError(f"not a JSON record ({error})", path=path, remedy="Run the stage again.") from error
    if not isinstance(data, dict):
        raise DataError("not a JSON record (no object)", path=path, remedy="Run the stage again.")
    return data


def _without_equal_floors(runs: Sequence[Run], floor: str) -> list[Run]:
    kept: list[Run] = []
    known = []
    for run in runs:
        scores = {(row["case_id"], row["region"], row["dice"]) for row in run.rows}
        if run.method == floor and scores in known:
            continue
        if run.method == floor:
            known.append(scores)
        kept.append(run)
    return kept


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of equal method names under the names of their folders as well."""
    names = [run.method for run in runs]
    labels: list[str] = []
    for run in runs:
        label = run.method
        if names.count(label) > 1:
            place = run.folder.resolve()
            home = place.parent.parent if place.parent.name == "runs" else place
            label = f"{run.method} ({home.name})"
        taken, n = label, 2
        while taken in labels:
            taken, n = f"{label} {n}", n + 1
        labels.append(taken)
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
