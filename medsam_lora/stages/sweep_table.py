"""The results of a sweep: its table, its figure, and what is printed; all three from the comparison of its runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from medsam_lora.analysis.costs import COSTS, SEED, run_rows
from medsam_lora.analysis.entries import Entry, gather
from medsam_lora.errors import DataError
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.tables import read_table
from medsam_lora.stages.compare import REQUIRED, TABLE, compare
from medsam_lora.stages.compare_sweeps import read_facts
from medsam_lora.stages.scoring import FLOOR
from medsam_lora.stages.sweep_file import Point, Sweep

logger = logging.getLogger(__name__)

DONE: Final = "done"
INCOMPLETE: Final = "incomplete"
FAILED: Final = "failed"
PENDING: Final = "pending"

COMPARISON: Final = "comparison"
FIGURE: Final = "sweep"


def table_rows(
    out: Path,
    sweep: Sweep,
    points: Sequence[Point],
    states: Mapping[str, str],
    errors: Mapping[str, str],
    bootstrap: int,
    seed: int,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows of ``sweep.csv``.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    sweep : Sweep
    points : sequence of Point
    states : mapping of str to str
        By point: ``done``, ``incomplete``, ``failed`` or ``pending``.
    errors : mapping of str to str
        By point that failed.
    bootstrap, seed : int
        Of the intervals over patients.

    Returns
    -------
    columns : list of str
        The point, the keys that are swept, the split, for every region the mean Dice with its interval, the number of
        cases, the costs, status and error.
    rows : list of dict
        One per point.
    """
    scored: dict[str, dict[str, dict[str, Any]]] = {}
    for point in points:
        if states[point.label] in (DONE, INCOMPLETE):
            for row in _run_rows(out / "runs" / point.label / TABLE, bootstrap, seed):
                scored.setdefault(point.label, {})[row["region"]] = row
    regions = list(dict.fromkeys(region for rows in scored.values() for region in rows))
    dice = [f"{region}_{name}" for region in regions for name in ("dice_mean", "dice_low", "dice_high")]
    columns = ["point", *sweep.keys, "split", "n_cases", *dice, *COSTS, "status", "error"]
    table = []
    for point in points:
        own = scored.get(point.label, {})
        line: dict[str, Any] = {"point": point.label, "split": sweep.split, "status": states[point.label]}
        line |= {"error": errors.get(point.label, ""), **point.values}
        for region, found in own.items():
            line |= {f"{region}_{name}": found[name] for name in ("dice_mean", "dice_low", "dice_high")}
            line |= {"n_cases": found["n_cases"]} | {name: found[name] for name in COSTS}
        table.append(line)
    return columns, table


def _run_rows(path: Path, bootstrap: int, seed: int) -> list[dict[str, Any]]:
    entries = gather([(path, read_table(path, REQUIRED, DataError))], FLOOR)
    methods: list[Entry] = [entry for entry in entries if not entry.is_floor]
    return run_rows(methods, read_facts(entries, []), bootstrap, seed)


def compare_points(
    out: Path, sweep: Sweep, points: Sequence[Point], rows: Sequence[Mapping[str, Any]], bootstrap: int, seed: int
) -> Path | None:
    """Compare the points that are scored, and put the figure of the sweep beside its table.

    Parameters
    ----------
    out : Path
    sweep : Sweep
    points : sequence of Point
    rows : sequence of mapping
        Of ``sweep.csv``.
    bootstrap, seed : int

    Returns
    -------
    Path or None
        The figure as PNG; None where nothing could be drawn, which the log says.
    """
    for kind in ("svg", "png"):
        (out / f"{FIGURE}.{kind}").unlink(missing_ok=True)
    scored = [row["point"] for row in rows if row["status"] in (DONE, INCOMPLETE)]
    tables = [out / "runs" / point.label / TABLE for point in points if point.label in scored]
    if not tables:
        logger.warning("no point is scored: there is nothing to compare")
        return None
    varied = [key for key in sweep.keys if key != SEED and len({row.get(key) for row in rows} - {None}) > 1]
    try:
        compare(tables, out / COMPARISON, bootstrap=bootstrap, seed=seed, by=varied[0] if varied else None)
    except DataError as error:
        logger.warning("the points are not compared: %s", error)
        return None
    for kind in ("svg", "png"):
        drawn = out / COMPARISON / f"{FIGURE}.{kind}"
        if drawn.is_file():
            write_bytes_atomically(out / f"{FIGURE}.{kind}", drawn.read_bytes())
    return out / f"{FIGURE}.png" if (out / f"{FIGURE}.png").is_file() else None


def printed(rows: Sequence[Mapping[str, Any]], sweep: Sweep) -> str:
    """The table of a sweep as text: Dice with its interval, parameters, memory, time, status.

    Parameters
    ----------
    rows : sequence of mapping
        Of ``sweep.csv``.
    sweep : Sweep
    """
    regions = list(
        dict.fromkeys(key.rpartition("_dice_mean")[0] for row in rows for key in row if key.endswith("_dice_mean"))
    )
    head = [
        "point",
        *(f"Dice {region}, {sweep.split}" for region in regions),
        "parameters",
        "MiB",
        "train s",
        "s/step",
        "status",
    ]
    lines = [head]
    for row in rows:
        dice = [
            f"{row[f'{r}_dice_mean']:.4f} ({row[f'{r}_dice_low']:.3f}-{row[f'{r}_dice_high']:.3f})"
            if row.get(f"{r}_dice_mean") is not None
            else ""
            for r in regions
        ]
        parameters, memory, seconds, step = (row.get(name) for name in COSTS)
        costs = [
            "" if parameters is None else f"{parameters:,.0f}",
            "" if memory is None else f"{memory:,.0f}",
            "" if seconds is None else f"{seconds:,.1f}",
            "" if step is None else f"{step:.3g}",
        ]
        lines.append([row["point"], *dice, *costs, row["status"]])
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
