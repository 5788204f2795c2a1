"""Comparing runs: their tables held against each other, the statistics written, the plots drawn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from medsam_lora.analysis.comparison import (
    check_comparable,
    choose_scores,
    compare_pairs,
    pairs_of,
    per_patient,
)
from medsam_lora.analysis.comparison_text import page
from medsam_lora.analysis.cost_text import cost_lines
from medsam_lora.analysis.costs import run_rows, seed_groups, seed_rows
from medsam_lora.analysis.entries import Entry, gather
from medsam_lora.errors import ConfigError, DataError, nearest
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.tables import (
    PER_PATIENT_COLUMNS,
    RUN_COLUMNS,
    SEED_COLUMNS,
    STATISTICS_COLUMNS,
    read_table,
    write_table,
)
from medsam_lora.stages.compare_plots import draw
from medsam_lora.stages.compare_sweeps import read_facts
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.relevance import check_key
from medsam_lora.stages.scoring import FLOOR

logger = logging.getLogger(__name__)

TABLE: Final = "per_case.csv"
# Tables of earlier versions lack the later columns; a comparison needs these.
REQUIRED: Final = (
    *("case_id", "patient_id", "run", "method", "region", "dice"),
    *("reference_volume_ml", "prediction_volume_ml", "prompt_source", "status"),
)


def compare(
    tables: Sequence[Path],
    out: Path,
    *,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    all_pairs: bool = False,
    by: str | None = None,
) -> list[dict[str, Any]]:
    """Compare the methods of several tables, paired by case and region.

    Parameters
    ----------
    tables : sequence of Path
        ``per_case.csv`` files, or folders that hold one. Where ``config.yaml``, ``log.csv`` and ``run.json`` stand
        beside a table, what the run cost is taken from them, and sweeps and training curves are drawn.
    out : Path
        Receives ``statistics.csv``, ``per_patient.csv``, ``runs.csv``, ``comparison.md``, ``comparison.json`` and the
        plots; ``seeds.csv`` where runs differ in nothing but ``train.seed``.
    baseline : str, optional
        Label of the method that every other is compared with; the first table's by default. Labels are the methods'
        names; those of runs of the same name say more and are listed where the label is unknown.
    metrics : sequence of str, optional
        Columns to compare (`analysis.comparison.choose_scores`).
    bootstrap, seed : int
        Resamples and seed of the intervals.
    all_pairs : bool
        Compare every method with every other.
    by : str, optional
        ``section.key`` of the setting against which Dice and costs are drawn; the rank by default, where it differs.

    Returns
    -------
    list of dict
        Rows of ``statistics.csv``.

    Raises
    ------
    ConfigError
        Where an argument cannot be used.
    DataError
        Where a table cannot be read, or the runs were not scored alike; nothing is written then.
    """
    if bootstrap < 1:
        raise ConfigError(f"{bootstrap} resamples", remedy="Give --bootstrap at least 1; 2000 is usual.")
    if by is not None:
        check_key(by)
    paths = _table_paths(tables)
    entries = _ordered(gather([(path, read_table(path, REQUIRED, DataError)) for path in paths], FLOOR), baseline)
    # Methods first, so that what differs between them is not told of their floor.
    held = sorted(entries, key=lambda entry: entry.is_floor)
    scores = choose_scores(held, metrics)
    check_comparable(held, scores)
    rows = compare_pairs(pairs_of(entries, all_pairs), scores, bootstrap, seed)
    patients = per_patient(entries, scores)
    unread: list[str] = []
    facts = read_facts(entries, unread)
    groups = seed_groups(entries, facts)
    runs, seeds = run_rows(entries, facts, bootstrap, seed), seed_rows(groups, bootstrap, seed)
    pictures, notes = draw(entries, groups, scores, out, bootstrap, seed, by)
    notes = [*unread, *_differing_postprocess(entries), *_differing_challenges(entries, metrics), *notes]
    for note in notes:
        logger.info(note)
    write_table(out / "statistics.csv", STATISTICS_COLUMNS, rows)
    write_table(out / "per_patient.csv", (*PER_PATIENT_COLUMNS, *(score.column for score in scores)), patients)
    write_table(out / "runs.csv", RUN_COLUMNS, runs)
    if seeds:
        write_table(out / "seeds.csv", SEED_COLUMNS, seeds)
    else:
        (out / "seeds.csv").unlink(missing_ok=True)
    text = page(entries, scores, rows, pictures, notes, cost_lines(runs, seeds))
    write_bytes_atomically(out / "comparison.md", text.encode())
    record = _record(paths, entries, rows, notes, bootstrap, seed)
    write_json(out / "comparison.json", record | {"runs": runs, "seeds": seeds})
    return rows


def _table_paths(tables: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for given in tables:
        path = given / TABLE if given.is_dir() else given
        if not path.is_file():
            remedy = f"Give {TABLE} files, or run folders that hold one."
            raise DataError(f"no {TABLE} here" if given.is_dir() else "no such file", path=given, remedy=remedy)
        if path.resolve() in [other.resolve() for other in paths]:
            raise ConfigError("the same table is given twice", path=path, remedy="Give each run once.")
        paths.append(path)
    return paths


def _ordered(entries: Sequence[Entry], baseline: str | None) -> list[Entry]:
    """The entries with the baseline first."""
    labels = [entry.label for entry in entries]
    if all(entry.is_floor for entry in entries):
        raise DataError("there is no method but the floor", path=entries[0].path, remedy="Give the table of a method.")
    if len(entries) < 2:
        raise DataError(
            f"there is one method only, {labels[0]}", path=entries[0].path, remedy="Give the table of another run too."
        )
    if baseline is None:
        return list(entries)
    if baseline not in labels:
        guess = nearest(baseline, labels)
        raise ConfigError(
            f"no method has the label {baseline!r}" + (f"; did you mean {guess}?" if guess else ""),
            remedy=f"Choose the baseline among {', '.join(labels)}.",
        )
    return sorted(entries, key=lambda entry: entry.label != baseline)


def _differing_postprocess(entries: Sequence[Entry]) -> list[str]:
    used = {entry.label: entry.values_of("postprocess") for entry in entries if not entry.is_floor}
    if len(set(used.values())) < 2:
        return []
    return ["post-processing differs: " + ", ".join(f"{label} {value}" for label, value in used.items())]


def _differing_challenges(entries: Sequence[Entry], metrics: Sequence[str] | None) -> list[str]:
    absent = [entry.label for entry in entries if not entry.has("challenge")]
    if metrics is not None or not absent or len(absent) == len(entries):
        return []
    return [f"scores of a challenge are not compared: {', '.join(absent)} was evaluated without --challenge"]


def _record(
    paths: Sequence[Path],
    entries: Sequence[Entry],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    return {
        **run_record(),
        "stage": "compare",
        "tables": [{"path": str(path.resolve()), "sha256": sha256_of(path)} for path in paths],
        "methods": [
            {"label": entry.label, "table": str(entry.path.resolve()), "is_floor": entry.is_floor} for entry in entries
        ],
        "baseline": entries[0].label,
        "bootstrap": bootstrap,
        "seed": seed,
        "notes": list(notes),
        "statistics": list(rows),
    }
