"""A sweep: a pipeline's method with settings varied, every point an ordinary run folder, one table and one figure."""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from medsam_lora.errors import ConfigError, ManifestError, MedsamLoraError, PreparedError
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.stages.cohort import choose_cases, find_cohort
from medsam_lora.stages.method_runs import store_for, train_and_predict, with_pretrained_weights
from medsam_lora.stages.pipeline import STAGES, Method
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.summary import score_method, write_scores
from medsam_lora.stages.sweep_file import Point, Sweep, grid_points, load_sweep, swept_methods, with_pipeline
from medsam_lora.stages.sweep_table import DONE, FAILED, INCOMPLETE, PENDING, compare_points, printed, table_rows
from medsam_lora.stages.workplace import Workplace, timed

logger = logging.getLogger(__name__)

POINT_FILE: Final = "point.json"
TRACEBACK_FILE: Final = "error.txt"


def sweep_file(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    root: Path | None = None,
    manifest: Path | None = None,
    device: str = "auto",
    workers: int = 1,
    dry_run: bool = False,
) -> int:
    """Run a sweep file; what is done already is not run again.

    Parameters
    ----------
    path : Path
    overrides : sequence of str
        As of `sweep_file.load_sweep`.
    out : Path or None
        ``out/<name>`` by default.
    root, manifest : Path, optional
        Over those of the file.
    device : str
    workers : int
    dry_run : bool
        List the points, and what is known of each, without any work.

    Returns
    -------
    int
        0, or 1 where a point failed, or some of its cases.
    """
    sweep = load_sweep(path, overrides)
    changes = {"root": root, "manifest": manifest}
    settings = sweep.pipeline.settings.model_copy(
        update={name: str(value) for name, value in changes.items() if value is not None}
    )
    sweep = with_pipeline(sweep, replace(sweep.pipeline, settings=settings))
    folder = Path("out") / settings.name if out is None else out
    if dry_run:
        _list_points(sweep, folder)
        return 0
    return run_sweep(sweep, folder, device=device, workers=workers)


def run_sweep(sweep: Sweep, out: Path, *, device: str = "auto", workers: int = 1) -> int:
    """Run a checked sweep in `out`; see `sweep_file`."""
    settings = sweep.pipeline.settings
    needed = [stage for stage in STAGES if stage != "verify" or "verify" in settings.stages]
    pipeline = replace(sweep.pipeline, settings=settings.model_copy(update={"stages": needed}))
    if sweep.settings.study is not None:
        from medsam_lora.stages.study import check_installed

        check_installed()
    out.mkdir(parents=True, exist_ok=True)
    place = Workplace(out, pipeline, find_cohort(pipeline, out, workers), device, workers, split=sweep.split)
    place.pipeline = with_pretrained_weights(place)
    sweep = with_pipeline(sweep, place.pipeline)
    with timed(place, "verify"):
        choose_cases(place)
    _check_cases(place)
    if sweep.settings.study is None:
        points = grid_points(sweep)
        _run_points(place, sweep, points)
    else:
        from medsam_lora.stages.study import run_study

        points = run_study(place, sweep)
    return _finish(place, sweep, points)


def run_point(place: Workplace, point: Point) -> str:
    """Prepare, train, predict and score one point; a fault is recorded and ends this point alone.

    Parameters
    ----------
    place : Workplace
        Gains the cases that failed.
    point : Point

    Returns
    -------
    str
        ``done``, ``failed``, or ``incomplete`` where some cases failed; as in ``point.json``.
    """
    folder = place.run_folder(point.method, "")
    inputs = _inputs(place, point.method)
    if state_of(place.out, point.label, inputs) == DONE:
        logger.info("%s is done already", point.label)
        return DONE
    record: dict[str, Any] = {
        "point": point.label,
        "values": dict(point.values),
        "split": place.split,
        "inputs": inputs,
    }
    before = len(place.failures)
    (folder / TRACEBACK_FILE).unlink(missing_ok=True)
    try:
        for fold, manifest in place.fold_manifests():
            train_and_predict(place, point.method, fold, manifest, _store(place, point.method, fold, manifest))
        rows, floor = score_method(place, point.method)
        write_scores(place, point.label, [*rows, *floor])
        status, error = INCOMPLETE if len(place.failures) > before else DONE, ""
    except Exception as fault:  # whatever it is, the other points do not depend on it; all of it is kept
        status, error = FAILED, str(fault) if isinstance(fault, MedsamLoraError) else f"{type(fault).__name__}: {fault}"
        logger.error("point %s failed: %s", point.label, error)
        write_bytes_atomically(folder / TRACEBACK_FILE, traceback.format_exc().encode())
    write_json(folder / POINT_FILE, record | {"status": status, "error": error})
    return status


def state_of(out: Path, label: str, inputs: str | None = None) -> str:
    """What is known of a point: its status, or ``pending`` where there is none, or of other inputs."""
    record = read_point(out, label)
    known = inputs is None or record.get("inputs") == inputs
    scored = (out / "runs" / label / "per_case.csv").is_file()
    status = str(record.get("status", PENDING))
    return status if known and (scored or status == FAILED) else PENDING


def read_point(out: Path, label: str) -> dict[str, Any]:
    """``point.json`` of a point; empty where there is none."""
    path = out / "runs" / label / POINT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_sweep_table(place: Workplace, sweep: Sweep, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Write ``sweep.csv``: a row per point, whatever became of it.

    Parameters
    ----------
    place : Workplace
    sweep : Sweep
    points : sequence of Point

    Returns
    -------
    list of dict
        The rows.
    """
    states = {p.label: state_of(place.out, p.label, _inputs(place, p.method)) for p in points}
    errors = {
        p.label: str(read_point(place.out, p.label).get("error", "")) for p in points if states[p.label] == FAILED
    }
    base = place.pipeline.base.evaluate
    columns, rows = table_rows(place.out, sweep, points, states, errors, base.bootstrap, base.seed)
    write_table(place.out / "sweep.csv", columns, rows)
    return rows


def _run_points(place: Workplace, sweep: Sweep, points: Sequence[Point]) -> None:
    for at, point in enumerate(points, 1):
        logger.info("point %d of %d: %s", at, len(points), point.label)
        with timed(place, point.label):
            run_point(place, point)
        write_sweep_table(place, sweep, points)


def _finish(place: Workplace, sweep: Sweep, points: Sequence[Point]) -> int:
    """Table, comparison, figure and record of what is there now; the exit code."""
    rows = write_sweep_table(place, sweep, points)
    unique = {(f.case_id, f.file, f.code, f.detail): f for f in place.failures}
    write_table(place.out / "failures.csv", FINDING_COLUMNS, [vars(f) for f in unique.values()])
    base = place.pipeline.base.evaluate
    figure = compare_points(place.out, sweep, points, rows, base.bootstrap, base.seed)
    write_json(
        place.out / "run.json",
        run_record(place.pipeline.base)
        | {
            "sweep": sweep.settings.model_dump(mode="json"),
            "pipeline": place.pipeline.settings.model_dump(mode="json"),
            "split": sweep.split,
            "points": {point.label: dict(point.values) for point in points},
            "stage_seconds": place.seconds,
        },
    )
    print(printed(rows, sweep))
    if figure is not None:
        print(f"figure: {figure}")
    failed = [row["point"] for row in rows if row["status"] == FAILED]
    if failed:
        print(
            f"{len(failed)} of {len(rows)} points failed: {', '.join(failed)} (sweep.csv, runs/<point>/{TRACEBACK_FILE})"
        )
    if unique:
        print(f"{len(unique)} faults; the cases concerned are listed in {place.out / 'failures.csv'}")
    print(f"table: {place.out / 'sweep.csv'}")
    return 1 if failed or unique else 0


def _store(place: Workplace, method: Method, fold: str, manifest: Path) -> Path:
    """The store of a point. All of its cases have to be in it: points on other cases could not be compared."""
    store, failed = store_for(place, method, fold, manifest)
    if failed:
        first = failed[0]
        raise PreparedError(
            f"{len(failed)} cases cannot be prepared with these settings, the first: {first.detail}",
            case_id=first.case_id,
            path=first.file or None,
            remedy=f"{first.remedy} Or take the case out of the manifest: all points need the same cases.",
        )
    return store


def _inputs(place: Workplace, method: Method) -> str:
    """A hash of what decides the scores of a point."""
    facts = {
        "config": method.config.model_dump(mode="json", exclude={"train": {"cache_gib", "processes"}}),
        "split": place.split,
        "manifests": [sha256_of(manifest) for _, manifest in place.fold_manifests()],
        "challenge": place.pipeline.base.evaluate.challenge,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_cases(place: Workplace) -> None:
    if place.pipeline.settings.folds is not None:
        return
    if not any(record.split == place.split for record in read_manifest(place.manifest)):
        raise ManifestError(
            f"no case is in the split {place.split}, so there is nothing to score",
            path=place.manifest,
            remedy="Give the split a share, or mark cases for it in the manifest.",
        )


def _list_points(sweep: Sweep, out: Path) -> None:
    if sweep.settings.study is not None:
        study = sweep.settings.study
        for key, choices in sweep.choices.items():
            print(f"{key}: {', '.join(choices)}")
        for key, numbers in sweep.ranges.items():
            print(f"{key}: {numbers.low} to {numbers.high}{', logarithmic' if numbers.log else ''}")
        method = swept_methods(sweep)[0].label
        print(f"study of {method}: {study.trials} trials ({study.sampler}), by the Dice of the split val, in {out}")
        return
    points = grid_points(sweep)
    for point in points:
        print(f"{state_of(out, point.label):10s} {point.label}")
    print(f"{len(points)} points, scored on the split {sweep.split}, in {out}")


def check_base(sweep: Sweep) -> Method:
    """The one method that a study tunes."""
    (method,) = swept_methods(sweep)
    if sweep.split != "val":
        raise ConfigError("a study is scored on val, never on test", remedy="Take `score: test` away.")
    return method
