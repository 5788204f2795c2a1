"""The end of a pipeline: every method scored, one summary table, one picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medsam_lora.analysis.statistics import bootstrap_mean, summarise
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.tables import SUMMARY_COLUMNS, per_case_columns, write_table
from medsam_lora.stages.evaluate import evaluate
from medsam_lora.stages.overview import write_overview
from medsam_lora.stages.scoring import FLOOR

if TYPE_CHECKING:
    from medsam_lora.stages.pipeline import Method
    from medsam_lora.stages.workplace import Workplace


def write_summary(place: Workplace) -> str:
    """Score every method of a pipeline and write its tables and its picture.

    Parameters
    ----------
    place : Workplace
        Gains the failures of scoring.

    Returns
    -------
    str
        What to print: Dice per case, methods beside each other, with means and intervals.

    Notes
    -----
    Writes ``runs/<label>/per_case.csv`` for every method and for the floor, ``summary.csv`` and ``overview.png``.
    With folds, a method's table holds every case once, scored by the model that had not seen it.
    """
    base = place.pipeline.base.evaluate
    tables: dict[str, list[dict[str, Any]]] = {}
    for method in place.pipeline.methods:
        rows, floor = score_method(place, method)
        tables[method.label] = rows
        # The boxes are the same for every method: the floor is scored once.
        tables.setdefault(FLOOR, floor)
    ordered = {FLOOR: tables.pop(FLOOR), **tables} if tables.get(FLOOR) else tables
    ordered = {label: rows for label, rows in ordered.items() if rows}
    for label, rows in ordered.items():
        write_scores(place, label, rows)
    everything = [row for rows in ordered.values() for row in rows]
    summary = summarise(everything, base.bootstrap, base.seed)
    write_table(place.out / "summary.csv", SUMMARY_COLUMNS, summary)
    write_overview(place, list(ordered))
    return case_table(ordered, summary) + "\n" + differences(ordered, base.bootstrap, base.seed)


def write_scores(place: Workplace, label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``runs/<label>/per_case.csv``."""
    columns = per_case_columns(place.pipeline.base.evaluate.challenge)
    write_table(place.out / "runs" / label / "per_case.csv", columns, rows)


def score_method(place: Workplace, method: Method) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a method and of its floor, over all folds; its log and settings are put together where there are folds.

    Parameters
    ----------
    place : Workplace
        Gains the failures of scoring.
    method : Method
    """
    rows: list[dict[str, Any]] = []
    for fold, manifest in place.fold_manifests():
        folder = place.run_folder(method, fold)
        scored, outcome = evaluate(
            manifest,
            place.root,
            folder / "predictions",
            folder / "evaluation",
            run=method.label + (f"/{fold}" if fold else ""),
            method=method.label,
            split=place.split,
            challenge=place.pipeline.base.evaluate.challenge,
            bootstrap=place.pipeline.base.evaluate.bootstrap,
            seed=place.pipeline.base.evaluate.seed,
            workers=place.workers,
        )
        rows += scored
        place.failures += outcome.failed
    if place.pipeline.settings.folds is not None:
        _gather_folds(place, method)
    return [r for r in rows if r["method"] != FLOOR], [r for r in rows if r["method"] == FLOOR]


def _gather_folds(place: Workplace, method: Method) -> None:
    """One ``log.csv`` (with the column `fold`) and one ``config.yaml`` for a method that was trained in folds."""
    rows: list[Mapping[str, Any]] = []
    columns: Sequence[str] = ()
    for fold, _ in place.fold_manifests():
        path = place.run_folder(method, fold) / "log.csv"
        if path.is_file():
            with path.open(newline="") as handle:
                reader = csv.DictReader(handle)
                columns = reader.fieldnames or ()
                rows += [{"fold": fold, **row} for row in reader]
    folder = place.out / "runs" / method.label
    write_table(folder / "log.csv", ["fold", *columns], rows)
    first = place.run_folder(method, place.fold_manifests()[0][0]) / "config.yaml"
    if first.is_file():
        write_bytes_atomically(folder / "config.yaml", first.read_bytes())


def case_table(tables: Mapping[str, Sequence[Mapping[str, Any]]], summary: Sequence[Mapping[str, Any]]) -> str:
    """Volumetric Dice per case, one column per method, as text.

    Examples
    --------
    >>> rows = [{"case_id": "a", "region": "WT", "dice": 0.5, "status": "ok"}]
    >>> summary = [{"method": "lora", "region": "WT", "dice_mean": 0.5, "dice_low": 0.5, "dice_high": 0.5}]
    >>> print(case_table({"lora": rows}, summary))
    volumetric Dice, WT             lora
    a                             0.5000
    mean                          0.5000
    95 % interval          0.5000-0.5000
    """
    lines = []
    regions = dict.fromkeys(row["region"] for row in summary)
    labels = list(tables)
    for region in regions:
        cases = dict.fromkeys(r["case_id"] for rows in tables.values() for r in rows if r["region"] == region)
        first = max([len(f"volumetric Dice, {region}"), *(len(c) for c in cases)])
        widths = [max(len(label), 13) for label in labels]
        cells = {
            label: {
                r["case_id"]: f"{r['dice']:.4f}" if r["status"] == "ok" else r["status"]
                for r in rows
                if r["region"] == region
            }
            for label, rows in tables.items()
        }
        by_method = {row["method"]: row for row in summary if row["region"] == region}

        def line(head: str, values: Sequence[str], first: int = first, widths: Sequence[int] = tuple(widths)) -> str:
            return "  ".join([head.ljust(first), *(v.rjust(w) for v, w in zip(values, widths, strict=True))])

        lines.append(line(f"volumetric Dice, {region}", labels))
        lines += [line(case, [cells[label].get(case, "") for label in labels]) for case in cases]
        means = [by_method.get(label) for label in labels]
        lines.append(line("mean", [f"{m['dice_mean']:.4f}" if m else "" for m in means]))
        intervals = [f"{m['dice_low']:.4f}-{m['dice_high']:.4f}" if m else "" for m in means]
        lines.append(line("95 % interval", intervals))
    return "\n".join(lines)


def differences(tables: Mapping[str, Sequence[Mapping[str, Any]]], n: int, seed: int) -> str:
    """Paired difference of the last method to every other one, with its interval and the cases won, as text."""
    *others, last = list(tables)
    lines = []
    for region in dict.fromkeys(r["region"] for r in tables[last]):
        mine = {r["case_id"]: r for r in tables[last] if r["region"] == region}
        for other in others:
            theirs = {r["case_id"]: r for r in tables[other] if r["region"] == region}
            paired = [c for c in mine if c in theirs]
            if not paired:
                continue
            gaps = [float(mine[c]["dice"]) - float(theirs[c]["dice"]) for c in paired]
            mean, low, high = bootstrap_mean(gaps, [mine[c]["patient_id"] for c in paired], n, seed)
            won = sum(gap > 0 for gap in gaps)
            lines.append(
                f"{last} - {other} ({region}): {mean:+.4f} (95 % {low:+.4f} to {high:+.4f}), "
                f"higher in {won} of {len(paired)} cases"
            )
    return "\n".join(lines)
