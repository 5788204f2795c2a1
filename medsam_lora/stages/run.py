"""A whole pipeline: verify, prepare, train, predict and evaluate for every method and fold; comparison and report."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsam_lora.errors import ManifestError, PreparedError
from medsam_lora.io.files import sha256_of
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.partial import VERIFIED_FILE
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.stages.cohort import choose_cases, find_cohort
from medsam_lora.stages.pipeline import STAGES, Method, Pipeline, load_pipeline
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.scoring import FLOOR
from medsam_lora.stages.summary import write_summary
from medsam_lora.stages.workplace import Workplace, timed

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
    return run(pipeline, folder, start=start, device=device, workers=workers)


def run(pipeline: Pipeline, out: Path, *, start: str | None = None, device: str = "auto", workers: int = 1) -> int:
    """Run a checked pipeline in `out`; see `run_file`."""
    if start is not None and start not in STAGES:
        raise ManifestError(f"unknown stage {start!r}", remedy=f"--from takes one of {', '.join(STAGES)}.")
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    place = Workplace(out, pipeline, find_cohort(pipeline, out, workers), device, workers, start)
    pipeline = place.pipeline = _pretrained(place)
    with timed(place, "verify"):
        choose_cases(place)
    with timed(place, "prepare"):
        stores = _prepare(place)
    for method in pipeline.methods:
        for fold, manifest in place.fold_manifests():
            _train_and_predict(place, method, fold, manifest, stores.get((method.label, fold)))
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


def _pretrained(place: Workplace) -> Pipeline:
    """The pipeline with its methods' weights set to the pre-trained ones, where it asks for pre-training."""
    section = place.pipeline.settings.pretrain
    if section is None:
        return place.pipeline
    from medsam_lora.stages.pretrain import pretrain_nano

    with timed(place, "pretrain"):
        weights = pretrain_nano(place.out / "pretrained", section, place.device)

    def with_weights(method: Method) -> Method:
        model = method.config.model.model_copy(update={"weights": str(weights)})
        return Method(method.label, method.config.model_copy(update={"model": model}))

    return replace(place.pipeline, methods=tuple(with_weights(m) for m in place.pipeline.methods))


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
    from medsam_lora.stages.prepare import prepare

    made: dict[str, Path] = {}
    stores: dict[tuple[str, str], Path] = {}
    for method in place.pipeline.methods:
        config = method.config
        sections = {"data", "slicing", "crop", "intensity"}
        key = config.model_dump_json(include=sections) + ",".join(config.train.regions)
        for fold, manifest in place.fold_manifests():
            if key + fold not in made:
                store, outcome = prepare(
                    manifest,
                    place.root,
                    place.out / "prepared",
                    config,
                    workers=place.workers,
                    verified=place.out / VERIFIED_FILE,
                )
                place.failures += outcome.failed
                bad = {f.case_id for f in outcome.failed}
                if bad:
                    write_manifest(manifest, [r for r in read_manifest(manifest) if r.case_id not in bad])
                made[key + fold] = store
            stores[method.label, fold] = made[key + fold]
    write_json(pointer, [[label, fold, store.name] for (label, fold), store in stores.items()])
    return stores


def _train_and_predict(place: Workplace, method: Method, fold: str, manifest: Path, store: Path | None) -> None:
    folder = place.run_folder(method, fold)
    name = f"{method.label} {fold}".strip()
    if place.runs("train"):
        assert store is not None
        with timed(place, f"train {name}"):
            _train(place, method, folder, manifest, store)
    if place.runs("predict"):
        from medsam_lora.stages.predict import predict

        logger.info("predict: %s", name)
        with timed(place, f"predict {name}"):
            outcome = predict(
                manifest,
                place.root,
                folder,
                folder / "predictions",
                method.config,
                split="test",
                device=place.device,
                cache=place.cache,
            )
        place.failures += outcome.failed


def _train(place: Workplace, method: Method, folder: Path, manifest: Path, store: Path) -> None:
    """Train unless the same was done already; go on where it was stopped."""
    from medsam_lora.stages.train import STATE_FILE, train

    inputs = {
        "config": method.config.model_dump(
            mode="json", exclude={"predict": True, "evaluate": True, "train": {"cache_gib", "processes"}}
        ),
        "store": store.name,
        "manifest": sha256_of(manifest),
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    mark = folder / "inputs.sha256"
    same = mark.is_file() and mark.read_text().strip() == key
    if same and (folder / "run.json").is_file() and place.start != "train":
        logger.info("%s is trained already", folder)
        return
    resume = same and not (folder / "run.json").is_file() and (folder / STATE_FILE).is_file()
    (folder / "run.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(key + "\n")
    logger.info("train: %s%s", folder.relative_to(place.out), " (resumed)" if resume else "")
    train(manifest, store, folder, method.config, device=place.device, resume=resume, cache=place.cache)
