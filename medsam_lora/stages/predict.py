"""Prediction of whole cases: from native files and boxes to masks on the native grid."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsam_lora.config import Config, PredictConfig
from medsam_lora.errors import ConfigError, DataError, ManifestError, MedsamLoraError
from medsam_lora.inference import postprocess
from medsam_lora.inference.predictor import PredictOptions, predict_slices
from medsam_lora.inference.volume import to_native
from medsam_lora.io.case import read_case
from medsam_lora.io.files import sha256_of
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.nifti import write_label_map
from medsam_lora.io.seg_nrrd import segments_for, write_seg_nrrd
from medsam_lora.io.tables import FINDING_COLUMNS, write_table
from medsam_lora.labels import label_map_of
from medsam_lora.models import MODELS
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import choose_device, load_segmenter
from medsam_lora.models.checkpoint import check_base
from medsam_lora.models.precision import resolve_amp
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.progress import track
from medsam_lora.prompts import BOX_TABLE, NO_PROMPT, REFERENCE_BOX
from medsam_lora.prompts.sources import on_grid, read_box_table, write_box_table
from medsam_lora.records import CaseRecord, CaseVolumes, Finding, SliceBox, StageOutcome
from medsam_lora.stages.case_boxes import BoxOptions, boxes_of_case, check_prompts
from medsam_lora.stages.record import run_record, write_json
from medsam_lora.stages.train import ADAPTER_FILE, CACHE_FOLDER
from medsam_lora.training.guards import peak_memory_mib, reset_peak_memory
from medsam_lora.transforms.stages import PreparePlan, crop_geometry, prepare_case

logger = logging.getLogger(__name__)

REGIONS_BY_AREA = "the three masks of a slice are given to WT, TC, ET by descending area"
"""What a record says of the regions of a method that was trained on none."""


@dataclass(frozen=True)
class Task:
    """What every case of one prediction shares."""

    segmenter: Segmenter
    plan: PreparePlan
    root: Path
    out: Path
    boxes: BoxOptions
    options: PredictOptions
    max_bytes: int
    clean_up: Mapping[str, postprocess.CleanUp]


def task_of(
    segmenter: Segmenter,
    metadata: Mapping[str, Any],
    root: Path,
    out: Path,
    options: PredictOptions,
    max_bytes: int,
    prompted: bool = True,
) -> Task:
    """What every case shares, from what an adapter says of itself.

    Parameters
    ----------
    segmenter : Segmenter
    metadata : mapping
        Of its adapter.
    root, out : Path
    options : PredictOptions
    max_bytes : int
        Cap on the bytes that the header of a volume may claim.
    prompted : bool
        False: whole slices take the place of boxes.
    """
    return Task(
        segmenter,
        PreparePlan.from_json(metadata["plan"]),
        root,
        out,
        BoxOptions(metadata["prompts"]["kind"], metadata["prompts"]["min_voxels"], prompted),
        options,
        max_bytes,
        postprocess.from_json(metadata.get("postprocess", {})),
    )


def predict(
    manifest: Path,
    root: Path | None,
    run: Path,
    out: Path,
    config: Config,
    *,
    boxes: Path | None = None,
    split: str | None = None,
    device: str = "auto",
    cache: Path | None = None,
    sharers: int = 1,
) -> StageOutcome:
    """Predict the cases of a manifest with a run's adapter.

    Parameters
    ----------
    manifest : Path
    root : Path or None
        Data root; the manifest's folder by default.
    run : Path
        A run folder (or an adapter file).
    out : Path
        Receives ``<case_id>.nii.gz``, ``<case_id>.seg.nrrd``, ``prompts.csv``, ``record.json``, ``failures.csv``.
    config : Config
        Its `predict` section, ``data.max_gib``, ``model.weights`` and ``model.attention`` hold; everything else is as
        trained, because the adapter fixes it. A ``model.grid`` that is set and another is refused.
    boxes : Path, optional
        CSV of box prompts (`io.tables.BOX_COLUMNS`, native frame); without it boxes come from the reference.
    split : str, optional
        Only the cases of this split.
    device : str
    cache : Path, optional
        Folder of cached image embeddings, where ``train.cache_gib`` gives them room; beside `out` by default.
    sharers : int
        Runs under way that share this room, this one among them.

    Returns
    -------
    StageOutcome
        Cases that were there already, from the same files, boxes and adapter, are `skipped`.
    """
    started = time.perf_counter()
    keep_freed_memory()
    adapter = run if run.is_file() else run / ADAPTER_FILE
    target = choose_device(device)
    reset_peak_memory(target)
    records = chosen_cases(read_manifest(manifest), split, manifest)
    prompted = config.predict.prompts == "boxes"
    if boxes is not None and not prompted:
        raise ConfigError("--boxes was given beside predict.prompts=none", remedy="Leave one of them out.")
    given = None if boxes is None else read_box_table(boxes)
    chosen = config.model.model_fields_set
    segmenter, metadata = load_segmenter(
        adapter, config.model.weights, target, config.model.attention if "attention" in chosen else None
    )
    check_prompts(config.predict.prompts, metadata["method"])
    if "grid" in chosen:
        # What else a model section says is as trained; this was asked for by name and would be another function.
        check_base(metadata, segmenter.sam.name, segmenter.sam.base_sha256, None, adapter, config.model.grid)
    folder = out.parent / CACHE_FOLDER if cache is None else cache
    fixed = sha256_of(adapter) if config.predict.keep_embeddings else ""
    room = int(config.train.cache_gib * 2**30)
    cached = segmenter.use_cache(folder, room, config.predict.amp, fixed=fixed, writers=sharers)
    if fixed and not cached:
        logger.warning(
            "predict.keep_embeddings keeps nothing: %s",
            "train.cache_gib gives it no room" if room <= 0 else "the method looks at stacks of slices",
        )
    options = PredictOptions(config.predict.batch_size, config.predict.amp, config.predict.threshold)
    task = task_of(
        segmenter,
        metadata,
        manifest.parent if root is None else root,
        out,
        options,
        int(config.data.max_gib * 2**30),
        prompted,
    )
    _, meanings = label_map_of(np.zeros((len(segmenter.regions), 1, 1, 1), bool), segmenter.regions)
    if segmenter.regions_by_area:
        logger.warning("%s has no notion of regions: %s", metadata["method"], REGIONS_BY_AREA)
    notice = MODELS[metadata["model_name"]].notice
    if notice is not None:
        logger.warning("%s", notice)
    about = (
        run_record()
        | ({} if notice is None else {"notice": notice})
        | {
            "stage": "predict",
            "run": run.name if run.is_dir() else run.stem,
            "method": metadata["method"],
            "method_options": metadata["method_options"],
            "prompt_source": NO_PROMPT if not prompted else REFERENCE_BOX if boxes is None else BOX_TABLE,
            "regions": list(segmenter.regions),
            "regions_from": REGIONS_BY_AREA if segmenter.regions_by_area else "training",
            "labels": {str(value): name for value, name in meanings.items()},
            "postprocess": postprocess.describe(task.clean_up),
            "manifest": str(manifest.resolve()),
            "root": str(task.root.resolve()),
            "modalities": list(segmenter.modalities),
            "cases": [record.case_id for record in records],
            "adapter_sha256": sha256_of(adapter),
            "base_sha256": metadata["base_sha256"],
            "predict": config.predict.model_dump(mode="json"),
            "device": str(target),
            "amp": resolve_amp(config.predict.amp, target),
        }
    )
    log = _Log(out, _identity(adapter, config.predict), about)
    outcome = StageOutcome()
    for record in track(records, "predict"):
        mine = None if given is None else given.get(record.case_id, [])
        key = _case_key(record, mine)
        if log.is_done(record.case_id, key):
            outcome.skipped.append(record.case_id)
            continue
        try:
            used = predict_case(task, record, mine)
        except MedsamLoraError as error:
            outcome.failed.append(_finding(record.case_id, error))
            logger.error("%s", error)
            continue
        log.add(record.case_id, key, used)
        outcome.done.append(record.case_id)
    log.finish({"duration_s": time.perf_counter() - started, "peak_memory_mib": peak_memory_mib(target)})
    write_table(out / "failures.csv", FINDING_COLUMNS, [vars(f) for f in outcome.failed])
    return outcome


def predict_case(task: Task, record: CaseRecord, given: Sequence[SliceBox] | None) -> list[SliceBox]:
    """Predict and write one case.

    Parameters
    ----------
    task : Task
    record : CaseRecord
    given : sequence of SliceBox, optional
        Native frame; from the reference where there are none given.

    Returns
    -------
    list of SliceBox
        The boxes used, in the native frame.

    Raises
    ------
    DataError
        Where the case or its boxes cannot be used.
    """
    # What preparation did with voxels that are no numbers is done here too.
    case = read_case(
        record,
        task.root,
        task.segmenter.modalities,
        max_bytes=task.max_bytes,
        nonfinite=task.plan.nonfinite,
        allow_missing=True,
    )
    if len(case.modalities) < len(task.segmenter.modalities):
        absent = sorted(set(task.segmenter.modalities) - set(case.modalities))
        logger.warning("case %s: predicted without %s", record.case_id, ", ".join(absent))
    boxes = boxes_of_case(case, given, task.boxes)
    label_map, meanings = label_map_of(native_masks(task, case, boxes), task.segmenter.regions)
    write_seg_nrrd(task.out / f"{record.case_id}.seg.nrrd", label_map, case.geometry, segments_for(meanings))
    # Last, as its presence says that the case is done.
    write_label_map(task.out / f"{record.case_id}.nii.gz", label_map, case.geometry)
    return boxes


def native_masks(task: Task, case: CaseVolumes, boxes: Sequence[SliceBox]) -> np.ndarray:
    """Masks of a case on its native grid.

    Parameters
    ----------
    task : Task
    case : CaseVolumes
    boxes : sequence of SliceBox
        Native frame.

    Returns
    -------
    ndarray of bool, shape (R, X, Y, Z)
        Nested, and cleaned up where the adapter says so.
    """
    placed = on_grid(boxes, case.geometry, crop_geometry(case.geometry, task.plan))
    if boxes and not placed:
        raise DataError(
            "no box lies inside the crop",
            case_id=case.record.case_id,
            remedy="Check that the boxes are voxel indices of this very file (array axes 0, 1, 2).",
        )
    slices = prepare_case(case, task.plan, sorted(placed))
    masks = predict_slices(task.segmenter, slices, placed, task.options)
    native = np.stack([to_native(masks[:, r], slices) for r in range(masks.shape[1])])
    if not task.clean_up:
        return native
    return postprocess.clean_regions(native, case.geometry.voxel_volume_ml, task.segmenter.regions, task.clean_up)


class _Log:
    """What is done in a predictions folder, so that a second run does only what is missing."""

    def __init__(self, out: Path, identity: str, record: dict[str, Any]) -> None:
        self.out = out
        self.identity = identity
        self.record = record
        self.keys: dict[str, str] = {}
        self.boxes: dict[str, list[SliceBox]] = {}
        path = out / "record.json"
        if path.is_file() and (out / "prompts.csv").is_file():
            try:
                old = json.loads(path.read_text())
            except json.JSONDecodeError:
                old = {}
            if old.get("identity") == identity:
                self.keys = dict(old.get("done", {}))
                self.boxes = read_box_table(out / "prompts.csv")
        # Before the first case: whoever reads half a folder must know what its labels mean.
        self._write()

    def is_done(self, case_id: str, key: str) -> bool:
        return self.keys.get(case_id) == key and (self.out / f"{case_id}.nii.gz").is_file()

    def add(self, case_id: str, key: str, boxes: list[SliceBox]) -> None:
        self.keys[case_id] = key
        self.boxes[case_id] = boxes
        self._write()

    def finish(self, costs: dict[str, Any]) -> None:
        self.record |= costs
        self._write()

    def _write(self) -> None:
        write_box_table(self.out / "prompts.csv", self.boxes)
        write_json(self.out / "record.json", self.record | {"identity": self.identity, "done": self.keys})


def chosen_cases(records: Sequence[CaseRecord], split: str | None, manifest: Path) -> list[CaseRecord]:
    """The cases of a split, all of them where it is None.

    Raises
    ------
    ManifestError
        Where there are none.
    """
    chosen = [r for r in records if split is None or r.split == split]
    if not chosen:
        known = ", ".join(sorted({r.split or "(empty)" for r in records})) or "none"
        raise ManifestError(
            f"no case is in the split {split!r} (splits here: {known})", path=manifest, remedy="Choose another --split."
        )
    return chosen


def _identity(adapter: Path, options: PredictConfig) -> str:
    # Of predictions with boxes as it was before there were others, so that they are not made anew.
    prompts = [] if options.prompts == "boxes" else [options.prompts]
    text = json.dumps([sha256_of(adapter), options.threshold, options.amp, *prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _case_key(record: CaseRecord, boxes: Sequence[SliceBox] | None) -> str:
    text = json.dumps([record.sha256, None if boxes is None else [vars(b) for b in boxes]])
    return hashlib.sha256(text.encode()).hexdigest()


def _finding(case_id: str, error: MedsamLoraError) -> Finding:
    path = "" if error.path is None else str(error.path)
    return Finding(case_id, path, error.code or "failed", "error", error.message, error.remedy or "")
