"""A whole pipeline: verify, prepare, train, predict and evaluate for every method and fold; comparison and report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsam_lora.errors import ManifestError, PreparedError
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.stages.cohort import choose_cases, find_cohort
from medsam_lora.stages.method_runs import store_for, train_and_predict, with_pretrained_weights
from medsam_lora.stages.pipeline import STAGES, Pipeline, check_methods, load_pipeline
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.scoring import FLOOR
from medsam_lora.stages.side_by_side import check_jobs, side_by_side
from medsam_lora.stages.summary import write_summary
from medsam_lora.stages.workplace import Workplace, check_cases, timed

logger = logging.getLogger(__name__)


def run_file(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    start: str | None = None,
    root: Path | None = None,
    manifest: Path | None = None,
    device: str = "auto",
    workers: int = 1,
    jobs: int = 1,
) -> int:
    """Run a pipeline file.

    Parameters
    ----------
    path : Path
    overrides : sequence of str
        ``section.key=value``.
    out : Path or None
        ``out/<name>`` by default.
    start : str, optional
        Begin at this stage, using what the earlier ones left in `out`, and do it and the later ones anew.
    root, manifest : Path, optional
        Over those of the file.
    device : str
    workers : int
    jobs : int
        Methods and folds that are trained and predicted at a time (`side_by_side`).

    Returns
    -------
    int
        0, or 1 where some cases failed.
    """
    pipeline = load_pipeline(path, overrides)
    changes: dict[str, Any] = {}
    if root is not None:
        changes["root"] = str(root)
    if manifest is not None:
        changes["manifest"] = str(manifest)
    if changes:
        pipeline = replace(pipeline, settings=pipeline.settings.model_copy(update=changes))
    folder = Path("out") / pipeline.settings.name if out is None else out
    return run(pipeline, folder, start=start, device=device, workers=workers, jobs=jobs)


def run(
    pipeline: Pipeline,
    out: Path,
    *,
    start: str | None = None,
    device: str = "auto",
    workers: int = 1,
    jobs: int = 1,
) -> int:
    """Run a checked pipeline in `out`; see `run_file`."""
    if start is not None and start not in STAGES:
        raise ManifestError(f"unknown stage {start!r}", remedy=f"--from takes one of {', '.join(STAGES)}.")
    check_jobs(pipeline.methods, device, jobs)
    if {"train", "predict"} & set(pipeline.settings.stages):
        check_methods(pipeline.methods, pipeline.path)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    place = Workplace(out, pipeline, find_cohort(pipeline, out, workers), device, workers, start)
    pipeline = place.pipeline = with_pretrained_weights(place)
    with timed(place, "verify"):
        choose_cases(place)
    check_cases(place)
    with timed(place, "prepare"):
        stores = _prepare(place)
    # Cases that could not be prepared are left out, which can be all of a split.
    check_cases(place)
    if place.runs("train") or place.runs("predict"):
        side_by_side(
            place,
            {
                f"{method.label} {fold}".strip(): (
                    train_and_predict,
                    (method, fold, manifest, stores.get((method.label, fold))),
                )
                for method in pipeline.methods
                for fold, manifest in place.fold_manifests()
            },
            jobs,
        )
    summary = None
    if place.runs("evaluate"):
        with timed(place, "evaluate"):
            summary = write_summary(place)
    # The same fault can be met by several methods and folds; once is enough for the reader.
    unique = {(f.case_id, f.file, f.code, f.detail): f for f in place.failures}
    write_table(out / "failures.csv", FINDING_COLUMNS, [vars(f) for f in unique.values()])
    if place.runs("compare"):
        with timed(place, "compare"):
            _compare(place)
    # Before the report, which tells what is in it.
    _write_record(place, started)
    page = None
    if place.runs("report"):
        with timed(place, "report"):
            page = _report(place)
    if summary is not None:
        print(summary)
    if page is not None:
        print(f"report: {page}")
    if unique:
        print(f"{len(unique)} faults; the cases concerned are listed in {out / 'failures.csv'}")
    print(f"results: {out}")
    return 1 if unique else 0


def _tables(place: Workplace) -> list[Path]:
    """``per_case.csv`` of every method and of the floor, as far as they are there."""
    labels = [*(method.label for method in place.pipeline.methods), FLOOR]
    paths = [place.out / "runs" / label / "per_case.csv" for label in labels]
    return [path for path in paths if path.is_file()]


def _compare(place: Workplace) -> None:
    tables = _tables(place)
    if len(tables) < 2:
        logger.info("compare: nothing to compare with")
        return
    from medsam_lora.stages.compare import compare

    base = place.pipeline.base.evaluate
    compare(tables, place.out / "comparison", bootstrap=base.bootstrap, seed=base.seed)


def _report(place: Workplace) -> Path | None:
    if not _tables(place):
        logger.info("report: no method is scored yet")
        return None
    from medsam_lora.stages.report import report

    base, name = place.pipeline.base.evaluate, place.pipeline.settings.name
    return report(
        [place.out], place.out / "report.html", root=place.root, title=name, bootstrap=base.bootstrap, seed=base.seed
    )


def _write_record(place: Workplace, started: float) -> None:
    pipeline = place.pipeline
    write_json(
        place.out / "run.json",
        run_record(pipeline.base)
        | {
            "pipeline": pipeline.settings.model_dump(mode="json"),
            "methods": {m.label: m.config.model_dump(mode="json") for m in pipeline.methods},
            "stage_seconds": place.seconds,
            "duration_s": time.perf_counter() - started,
        },
    )


def _prepare(place: Workplace) -> dict[tuple[str, str], Path]:
    """The store of every method and fold; methods with equal settings share theirs."""
    pointer = place.out / "prepared" / "stores.json"
    if not place.runs("prepare"):
        if pointer.is_file():
            known = json.loads(pointer.read_text())
            return {(label, fold): place.out / "prepared" / name for label, fold, name in known}
        if place.start is not None and place.runs("train"):
            raise PreparedError("nothing is prepared yet", path=pointer, remedy="Run without --from first.")
        return {}
    stores: dict[tuple[str, str], Path] = {}
    for method in place.pipeline.methods:
        for fold, manifest in place.fold_manifests():
            store, failed = store_for(place, method, fold, manifest)
            place.failures += failed
            bad = {f.case_id for f in failed}
            if bad:
                write_manifest(manifest, [r for r in read_manifest(manifest) if r.case_id not in bad])
            stores[method.label, fold] = store
    write_json(pointer, [[label, fold, store.name] for (label, fold), store in stores.items()])
    return stores
