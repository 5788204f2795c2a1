"""A whole pipeline: cohort, verify, prepare, train, predict and evaluate for every method and fold, then a summary."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medsam_lora.errors import ManifestError, PreparedError
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.manifest import folds as deal_folds
from medsam_lora.io.manifest import parse_manifest, read_manifest, write_manifest
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.records import CaseRecord, Finding
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.pipeline import STAGES, Method, Pipeline, load_pipeline
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.summary import write_summary
from medsam_lora.stages.verify import verify

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass
class Workplace:
    """The folder of one pipeline run, and what its stages leave for each other."""

    out: Path
    pipeline: Pipeline
    root: Path
    device: str
    workers: int
    start: str | None = None
    failures: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def runs(self, stage: str) -> bool:
        """Whether a stage is asked for and not before ``--from``."""
        late_enough = self.start is None or STAGES.index(stage) >= STAGES.index(self.start)
        return stage in self.pipeline.settings.stages and late_enough

    @property
    def manifest(self) -> Path:
        """The manifest of the cases that are used."""
        return self.out / "manifest.csv"

    def fold_manifests(self) -> list[tuple[str, Path]]:
        """Name (empty where there are no folds) and manifest of every fold."""
        n = self.pipeline.settings.folds
        return (
            [("", self.manifest)]
            if n is None
            else [(f"fold{f}", self.out / "folds" / f"fold{f}.csv") for f in range(n)]
        )

    def run_folder(self, method: Method, fold: str) -> Path:
        """Folder of one method on one fold."""
        folder = self.out / "runs" / method.label
        return folder / fold if fold else folder


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
    place = Workplace(out, pipeline, _cohort(pipeline, out, workers), device, workers, start)
    pipeline = place.pipeline = _pretrained(place)
    with _timed(place, "verify"):
        _verify(place)
    with _timed(place, "prepare"):
        stores = _prepare(place)
    for method in pipeline.methods:
        for fold, manifest in place.fold_manifests():
            _train_and_predict(place, method, fold, manifest, stores.get((method.label, fold)))
    summary = None
    if place.runs("evaluate"):
        with _timed(place, "evaluate"):
            summary = write_summary(place)
    # The same fault can be met by several methods and folds; once is enough for the reader.
    unique = {(f.case_id, f.file, f.code, f.detail): f for f in place.failures}
    write_table(out / "failures.csv", FINDING_COLUMNS, [vars(f) for f in unique.values()])
    write_json(
        out / "run.json",
        run_record(pipeline.base)
        | {
            "pipeline": pipeline.settings.model_dump(mode="json"),
            "methods": {m.label: m.config.model_dump(mode="json") for m in pipeline.methods},
            "stage_seconds": place.seconds,
            "duration_s": time.perf_counter() - started,
        },
    )
    if summary is not None:
        print(summary)
    if unique:
        print(f"{len(unique)} faults; the cases concerned are listed in {out / 'failures.csv'}")
    print(f"results: {out}")
    return 1 if unique else 0


def default_root() -> Path:
    """Where the real cases are: ``$MEDSAM_LORA_BRATS_DIR``, else ``shared/data/brats`` beside the checkout."""
    named = os.environ.get("MEDSAM_LORA_BRATS_DIR")
    return Path(named) if named else CHECKOUT.parent / "shared" / "data" / "brats"


def _cohort(pipeline: Pipeline, out: Path, workers: int) -> Path:
    settings = pipeline.settings
    if settings.phantom is not None:
        from medsam_lora.datasets.phantom import make_cohort

        x, y, z = settings.phantom.shape
        make_cohort(out / "cohort", settings.phantom.cases, settings.phantom.seed, (x, y, z), workers=workers)
        return out / "cohort"
    root = default_root() if settings.root is None else Path(settings.root)
    if not root.is_dir():
        raise ManifestError(
            "the data root is not a folder", path=root, remedy="Give --root DIR, or set MEDSAM_LORA_BRATS_DIR."
        )
    return root


def _pretrained(place: Workplace) -> Pipeline:
    """The pipeline with its methods' weights set to the pre-trained ones, where it asks for pre-training."""
    section = place.pipeline.settings.pretrain
    if section is None:
        return place.pipeline
    from medsam_lora.stages.pretrain import pretrain_nano

    with _timed(place, "pretrain"):
        weights = pretrain_nano(place.out / "pretrained", section, place.device)

    def with_weights(method: Method) -> Method:
        model = method.config.model.model_copy(update={"weights": str(weights)})
        return Method(method.label, method.config.model_copy(update={"model": model}))

    return replace(place.pipeline, methods=tuple(with_weights(m) for m in place.pipeline.methods))


def _verify(place: Workplace) -> None:
    settings, data = place.pipeline.settings, place.pipeline.base.data
    if not place.runs("verify"):
        missing = [m for _, m in place.fold_manifests() if not m.is_file()]
        if place.start is not None and not missing:
            return
        if place.start is not None:
            raise ManifestError("no such file", path=missing[0], remedy="Run without --from first.")
    whole = place.out / "cohort.csv"
    if settings.manifest is None:
        shares = {"train": settings.split.train, "val": settings.split.val, "test": settings.split.test}
        build_manifest(place.root, whole, shares, settings.split.seed)
    else:
        given = Path(settings.manifest)
        if not given.is_file():
            raise ManifestError("no such file", path=given, remedy="Check --manifest.")
        write_bytes_atomically(whole, given.read_bytes())
    # Lines that contradict each other are findings of verify, so that the other cases go on.
    records = [r for _, r in parse_manifest(whole)] if "verify" in settings.stages else read_manifest(whole)
    if "verify" in settings.stages:
        findings = verify(
            whole,
            place.root,
            place.out / "findings.csv",
            workers=place.workers,
            max_bytes=int(data.max_gib * 2**30),
            nonfinite=data.nonfinite,
        )
        errors = [f for f in findings if f.severity == "error"]
        place.failures += errors
        bad = {f.case_id for f in errors}
        for case_id in sorted(bad):
            logger.error("case %s is left out: see findings.csv", case_id)
        records = [r for r in records if r.case_id not in bad]
    if not records:
        raise ManifestError("no usable case is left", path=whole, remedy="See findings.csv for the faults.")
    write_manifest(place.manifest, records)
    if settings.folds is not None:
        _write_folds(place, records, settings.folds)


def _write_folds(place: Workplace, records: Sequence[CaseRecord], n: int) -> None:
    scored = [r for r in records if "seg" in r.files]
    for (_, path), dealt in zip(
        place.fold_manifests(), deal_folds(scored, n, place.pipeline.settings.split.seed), strict=True
    ):
        write_manifest(path, dealt)


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
                store, outcome = prepare(manifest, place.root, place.out / "prepared", config, workers=place.workers)
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
        with _timed(place, f"train {name}"):
            _train(place, method, folder, manifest, store)
    if place.runs("predict"):
        from medsam_lora.stages.predict import predict

        logger.info("predict: %s", name)
        with _timed(place, f"predict {name}"):
            outcome = predict(
                manifest, place.root, folder, folder / "predictions", method.config, split="test", device=place.device
            )
        place.failures += outcome.failed


def _train(place: Workplace, method: Method, folder: Path, manifest: Path, store: Path) -> None:
    """Train unless the same was done already; go on where it was stopped."""
    from medsam_lora.stages.train import STATE_FILE, train

    inputs = {
        "config": method.config.model_dump(mode="json", exclude={"predict", "evaluate"}),
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
    train(manifest, store, folder, method.config, device=place.device, resume=resume)


class _timed:
    """Adds the seconds of a block to the workplace's record."""

    def __init__(self, place: Workplace, name: str) -> None:
        self.place, self.name = place, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.started
        self.place.seconds[self.name] = self.place.seconds.get(self.name, 0.0) + spent
