"""The prepare stage: from a manifest to a store of oriented, cropped slices, case by case.

The store's folder is named by the fingerprint of its plan, so that stores of different settings stand side by side,
and what is there already from the same files is left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsam_lora.config import Config
from medsam_lora.errors import DataError, PreparedError
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.partial import VERIFIED_FILE, Verified, read_verified
from medsam_lora.io.store import PREPARE_COLUMNS, TABLE_FILE, open_case, read_index, update_index, write_case
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.labels import REGIONS
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.records import CaseRecord, Finding, PreparedSlices, StageOutcome
from medsam_lora.stages.prepare_jobs import Job, each
from medsam_lora.stages.record import write_json
from medsam_lora.transforms.cropping import BrainBox, CropPlan, crop_window, union_box
from medsam_lora.transforms.slicing import SlicingPlan
from medsam_lora.transforms.stages import PreparePlan, case_brain_box, prepare_case

logger = logging.getLogger(__name__)


def prepare(
    manifest: Path,
    root: Path | None,
    out: Path,
    config: Config,
    *,
    workers: int = 1,
    verified: Path | None = None,
) -> tuple[Path, StageOutcome]:
    """Prepare the cases of a manifest.

    Parameters
    ----------
    manifest : Path
    root : Path or None
        Data root; the manifest's folder by default.
    out : Path
        Receives ``<fingerprint>/`` and, where a crop is fitted, ``brain_boxes/``.
    config : Config
        Its sections `data`, `slicing`, `crop` and `intensity` hold, and ``train.regions``.
    workers : int
        Processes.
    verified : Path, optional
        What `verify` noted of the files, ``verified.csv`` beside the manifest by default; without it every file is read
        to its end.

    Returns
    -------
    store : Path
        ``out/<fingerprint>``.
    outcome : StageOutcome
        Cases whose source files and plan are those of the store already are `skipped`; one that fails does not stop
        the others, and is also listed in ``failures.csv`` of the store.

    Raises
    ------
    ManifestError
        Where the manifest cannot be used.
    DataError
        Where no case could be read to fit the crop.
    """
    keep_freed_memory()
    records = read_manifest(manifest)
    root = manifest.parent if root is None else root
    plan = plan_from_config(config, records)
    max_bytes = int(config.data.max_gib * 2**30)
    failed: dict[str, Finding] = {}
    if plan.crop.needs_fit:
        jobs = [Job(record, root, plan, out, max_bytes) for record in _fitting_cases(records)]
        box, failed = _fit(jobs, workers)
        plan = replace(plan, crop=replace(plan.crop, box=box))
    store = out / plan.fingerprint()
    write_json(store / "plan.json", plan.to_json())
    write_json(store / "crop.json", _crop_summary(plan.crop))
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        slices = None if record.case_id in failed else _current(store / record.case_id, record)
        if slices is not None:
            rows[record.case_id] = _row(slices, "skipped")
    known = read_verified(manifest.with_name(VERIFIED_FILE) if verified is None else verified)
    jobs = [
        Job(record, root, plan, store, max_bytes, _of_case(known, record))
        for record in records
        if record.case_id not in failed and record.case_id not in rows
    ]
    for job, result in each(prepare_one, jobs, workers, "prepare"):
        if isinstance(result, Finding):
            failed[job.record.case_id] = result
        else:
            rows[job.record.case_id] = result
    return store, _report(store, records, rows, failed)


def plan_from_config(config: Config, records: Sequence[CaseRecord] = ()) -> PreparePlan:
    """The plan that a configuration asks for, its crop not yet fitted.

    Parameters
    ----------
    config : Config
    records : sequence of CaseRecord
        Where training cases are sliced otherwise than the rest, which they are is part of the plan.
    """
    crop = config.crop
    plan = PreparePlan(
        modalities=tuple(config.data.modalities),
        # Slices are chosen by the outermost region, which contains the others.
        region=next(region for region in REGIONS if region in config.train.regions),
        slicing=SlicingPlan(**config.slicing.model_dump()),
        crop=CropPlan(crop.name, crop.centre, crop.size, crop.margin, crop.allow_tumour_loss),
        voxels=config.intensity.voxels,
        scope=config.intensity.scope,
        nonfinite=config.data.nonfinite,
    )
    if not plan.slices_training_apart:
        return plan
    training = sorted(record.case_id for record in records if record.split == "train")
    return replace(plan, training_cases=_digest(training))


def _fitting_cases(records: Sequence[CaseRecord]) -> list[CaseRecord]:
    training = [record for record in records if record.split == "train"]
    if not training:
        logger.warning("no case is in the split 'train': the crop is fitted over all %d cases", len(records))
    return training or list(records)


def _fit(jobs: Sequence[Job], workers: int) -> tuple[BrainBox, dict[str, Finding]]:
    """The brain box over some cases; each case is measured once for as long as its files stay the same."""
    boxes = {job.record.case_id: box for job in jobs if (box := _known_box(job)) is not None}
    failed = {}
    for job, result in each(_box_of, [j for j in jobs if j.record.case_id not in boxes], workers, "fit the crop"):
        if isinstance(result, Finding):
            failed[job.record.case_id] = result
        else:
            boxes[job.record.case_id] = result
    if not boxes:
        first = next(iter(failed.values()))
        raise DataError(
            f"none of the {len(jobs)} cases that the crop is fitted over can be used; the first: {first.detail}",
            case_id=first.case_id,
            path=first.file or None,
            remedy="Run medsam-lora verify, or set crop.size or crop.name=none.",
        )
    return union_box(list(boxes.values()), "train" if jobs[0].record.split == "train" else "all"), failed


def _box_file(job: Job) -> Path:
    source = [job.record.case_id, job.record.sha256, job.plan.modalities, job.plan.nonfinite]
    return job.store / "brain_boxes" / f"{_digest(source)}.json"


def _known_box(job: Job) -> BrainBox | None:
    path = _box_file(job)
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return BrainBox(tuple(data["low"]), tuple(data["high"]), tuple(data["plane"]))


def _box_of(job: Job) -> BrainBox:
    box = case_brain_box(job.read())
    if job.record.sha256:
        case_id = job.record.case_id
        write_json(_box_file(job), {"case_id": case_id, "low": box.low, "high": box.high, "plane": box.plane})
    return box


def prepare_one(job: Job) -> dict[str, Any]:
    """Prepare one case; gives its row of ``prepare.csv``."""
    started = time.perf_counter()
    record = job.record
    slices = prepare_case(job.read_chosen(), job.plan)
    source = {"source_sha256": record.sha256, "label_convention": record.label_convention}
    write_case(job.store / record.case_id, slices, {**source, "fingerprint": job.plan.fingerprint()})
    return _row(slices, "done", round(time.perf_counter() - started, 3))


def _of_case(known: Verified, record: CaseRecord) -> Verified:
    places = [(record.case_id, file) for file in record.files.values()]
    return {place: known[place] for place in places if place in known}


def _row(slices: PreparedSlices, status: str, seconds: float | None = None) -> dict[str, Any]:
    x, y, _ = slices.crop.shape
    row = {"case_id": slices.case_id, "split": slices.split, "status": status, "n_slices": len(slices.ks)}
    return {**row, "x": x, "y": y, **slices.report, "duration_s": seconds}


def _current(folder: Path, record: CaseRecord) -> PreparedSlices | None:
    """What is stored of a case, where it was made from the files and the labels that the manifest names now."""
    try:
        index, slices = read_index(folder), open_case(folder)
    except PreparedError:
        return None
    source = (index.get("source_sha256"), index.get("label_convention"))
    if not record.sha256 or source != (record.sha256, record.label_convention):
        return None
    if (slices.split, slices.patient_id) == (record.split, record.patient_id):
        return slices
    if not slices.report["tumour_voxels"]:
        return None  # a case without tumour is refused as training case only
    update_index(folder, {"split": record.split, "patient_id": record.patient_id})
    return replace(slices, split=record.split, patient_id=record.patient_id)


def _report(
    store: Path, records: Sequence[CaseRecord], rows: dict[str, dict[str, Any]], failed: dict[str, Finding]
) -> StageOutcome:
    """Write the store's tables, in the order of the manifest, and tell what was done."""
    outcome = StageOutcome()
    for record in records:
        case_id = record.case_id
        if case_id in failed:
            outcome.failed.append(failed[case_id])
            rows[case_id] = {"case_id": case_id, "split": record.split, "status": "failed"}
        else:
            (outcome.skipped if rows[case_id]["status"] == "skipped" else outcome.done).append(case_id)
    write_table(store / "failures.csv", FINDING_COLUMNS, [vars(finding) for finding in outcome.failed])
    write_table(store / TABLE_FILE, PREPARE_COLUMNS, [rows[record.case_id] for record in records])
    return outcome


def _crop_summary(crop: CropPlan) -> dict[str, Any]:
    """The crop as data for the reader of the store; `plan.json` holds what the program needs."""
    size: Sequence[int] | None = crop.size
    if crop.name != "none" and crop.box is not None:
        start, stop = crop_window(crop, crop.box.plane)
        size = [b - a for a, b in zip(start, stop, strict=True)]
    fitted = None if crop.box is None else vars(crop.box)
    return {"name": crop.name, "centre": crop.centre, "size": size, "margin": crop.margin, "brain_box": fitted}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
