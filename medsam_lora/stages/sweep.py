"""A sweep: a pipeline's method with settings varied, every point an ordinary run folder, one table and one figure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medsam_lora.errors import ConfigError
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.stages.cohort import choose_cases, find_cohort
from medsam_lora.stages.method_runs import store_for, with_pretrained_weights
from medsam_lora.stages.pipeline import STAGES
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.side_by_side import check_jobs, side_by_side
from medsam_lora.stages.sweep_file import Point, Sweep, grid_points, load_sweep, swept_methods, with_pipeline
from medsam_lora.stages.sweep_points import TRACEBACK_FILE, run_point, state_of, write_sweep_table
from medsam_lora.stages.sweep_table import FAILED, compare_points, printed
from medsam_lora.stages.workplace import Workplace, check_cases, timed

logger = logging.getLogger(__name__)


def sweep_file(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    root: Path | None = None,
    manifest: Path | None = None,
    device: str = "auto",
    workers: int = 1,
    jobs: int = 1,
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
    jobs : int
        Points of a grid that are run at a time; the trials of a study follow each other.
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
    return run_sweep(sweep, folder, device=device, workers=workers, jobs=jobs)


def run_sweep(sweep: Sweep, out: Path, *, device: str = "auto", workers: int = 1, jobs: int = 1) -> int:
    """Run a checked sweep in `out`; see `sweep_file`."""
    settings = sweep.pipeline.settings
    needed = [stage for stage in STAGES if stage != "verify" or "verify" in settings.stages]
    pipeline = replace(sweep.pipeline, settings=settings.model_copy(update={"stages": needed}))
    if sweep.settings.study is not None:
        from medsam_lora.stages.study import check_installed

        check_installed()
        if jobs > 1:
            raise ConfigError("--jobs with a study, whose trials follow each other", remedy="Leave --jobs out.")
    if jobs > 1:
        check_jobs([point.method for point in grid_points(sweep)], device, jobs)
    out.mkdir(parents=True, exist_ok=True)
    place = Workplace(out, pipeline, find_cohort(pipeline, out, workers), device, workers, split=sweep.split)
    place.pipeline = with_pretrained_weights(place)
    sweep = with_pipeline(sweep, place.pipeline)
    with timed(place, "verify"):
        choose_cases(place)
    check_cases(place)
    if sweep.settings.study is None:
        points = grid_points(sweep)
        _run_points(place, sweep, points, jobs)
    else:
        from medsam_lora.stages.study import run_study

        points = run_study(place, sweep)
    return _finish(place, sweep, points)


def _run_points(place: Workplace, sweep: Sweep, points: Sequence[Point], jobs: int) -> None:
    write_sweep_table(place, sweep, points)
    if jobs > 1:
        _prepare(place, points)
    tasks = {point.label: (_timed_point, (point, at, len(points))) for at, point in enumerate(points, 1)}
    side_by_side(place, tasks, jobs, lambda: write_sweep_table(place, sweep, points))


def _timed_point(place: Workplace, point: Point, at: int, of: int) -> None:
    logger.info("point %d of %d: %s", at, of, point.label)
    with timed(place, point.label):
        run_point(place, point)


def _prepare(place: Workplace, points: Sequence[Point]) -> None:
    """Make the stores of all points, which two of them would otherwise make at once."""
    for point in points:
        for fold, manifest in place.fold_manifests():
            try:
                store_for(place, point.method, fold, manifest)
            except Exception:  # whatever it is, it ends this point alone, whose run meets it again and records it
                logger.debug("%s cannot be prepared", point.label)


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
        print(f"{len(failed)} of {len(rows)} points failed: {', '.join(failed)}")
        print(f"why: sweep.csv, in full in runs/<point>/{TRACEBACK_FILE}")
    if unique:
        print(f"{len(unique)} faults; the cases concerned are listed in {place.out / 'failures.csv'}")
    print(f"table: {place.out / 'sweep.csv'}")
    return 1 if failed or unique else 0


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
