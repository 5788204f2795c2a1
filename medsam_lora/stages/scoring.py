"""Scoring of one case: its prediction against its original label file, and the floor of filled boxes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medsam_lora import labels
from medsam_lora.errors import DataError, MedsamLoraError
from medsam_lora.geometry import Geometry
from medsam_lora.io.manifest import case_path
from medsam_lora.io.nifti import read_label_map
from medsam_lora.io.predictions import PredictionRecord, meanings_for, predicted_mask, prediction_path
from medsam_lora.metrics.overlap import Comparison
from medsam_lora.metrics.per_case import failed_nnunet_metrics, failed_scores, nnunet_metrics, region_scores
from medsam_lora.prompts.sources import fill_boxes
from medsam_lora.records import CaseRecord, Finding, SliceBox, Volume

FLOOR = "filled_box"
"""Method name of the floor: every box filled with tumour."""

FLOOR_REGION = "WT"

# What a reader's complaint about a prediction file means for its row; whatever else cannot be read is as good as
# missing.
_STATUS_OF_CODE = {
    "not_integer_labels": "wrong_label",
    "not_3d": "wrong_grid",
    "no_affine": "wrong_grid",
    "sheared_affine": "wrong_grid",
}


@dataclass(frozen=True)
class Job:
    """One case to score: everything a worker process needs."""

    case: CaseRecord
    root: Path
    folder: Path
    record: PredictionRecord
    regions: tuple[str, ...]
    boxes: tuple[SliceBox, ...] | None
    floor_source: str
    challenge: str | None = None


@dataclass
class CaseScores:
    """What scoring one case gave."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    floor_rows: list[dict[str, Any]] = field(default_factory=list)
    entry: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)


def score_case(job: Job) -> CaseScores:
    """Score one case.

    Parameters
    ----------
    job : Job

    Returns
    -------
    CaseScores
        Without rows where the reference cannot be read; with failed rows where the prediction cannot be scored.
    """
    scores = CaseScores()
    try:
        path = case_path(job.case, "seg", job.root)
        reference = read_label_map(path)
        canonical = labels.to_canonical(reference.array, job.case.label_convention)
    except MedsamLoraError as error:
        code = error.code or "unreadable"
        scores.findings.append(_finding(job.case, job.case.files["seg"], code, error.message, error.remedy))
        return scores
    masks = {region: labels.region_mask(canonical, region) for region in job.regions}
    file = prediction_path(job.folder, job.case.case_id)
    prediction, status = None, "ok"
    try:
        prediction = _read_prediction(file, job, reference.geometry)
    except _Unusable as problem:
        status = problem.status
        scores.findings.append(
            _finding(job.case, "" if file is None else file.name, status, problem.reason, problem.remedy)
        )
    entry: dict[str, Any] = {
        "reference_file": str(path),
        "prediction_file": str(file or job.folder / f"{job.case.case_id}.nii.gz"),
        "status": status,
        "metrics": {},
    }
    for region, mask in masks.items():
        row = _identity(job, job.record.method, job.record.prompt_source, region, status)
        if prediction is None:
            row |= failed_scores(mask, reference.geometry, job.challenge)
            entry["metrics"][region] = failed_nnunet_metrics(mask)
        else:
            comparison = Comparison(mask, prediction[region], reference.geometry)
            row |= region_scores(comparison, job.challenge)
            entry["metrics"][region] = nnunet_metrics(comparison.counts)
        scores.rows.append(row)
    scores.entry = entry
    if job.boxes is not None and FLOOR_REGION in masks:
        scores.floor_rows.append(_floor_row(job, masks[FLOOR_REGION], reference.geometry, status))
    return scores


class _Unusable(Exception):
    """A prediction that becomes a failed row."""

    def __init__(self, status: str, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.remedy = status, reason, remedy


def _read_prediction(file: Path | None, job: Job, grid: Geometry) -> dict[str, np.ndarray]:
    """Masks of the job's regions on the reference's grid."""
    if file is None:
        raise _Unusable("missing", "there is no prediction", f"Write {job.case.case_id}.nii.gz into {job.folder}.")
    try:
        volume = read_label_map(file)
    except DataError as error:
        status = _STATUS_OF_CODE.get(error.code or "", "missing")
        raise _Unusable(status, error.message, error.remedy or "Predict the case again.") from error
    _check_grid(volume, grid)
    meanings = meanings_for(job.record, job.case.label_convention)
    known = volume.array == 0
    for value in meanings:
        known |= volume.array == value
    if not known.all():
        values, counts = np.unique(volume.array[~known], return_counts=True)
        found = ", ".join(f"{v} ({c} voxels)" for v, c in zip(values.tolist(), counts.tolist(), strict=True))
        raise _Unusable(
            "wrong_label",
            f"label values {found} are not among {sorted(meanings)}",
            "Name the labels in record.json, or set label_convention in the manifest.",
        )
    return {region: predicted_mask(volume.array, region, meanings) for region in job.regions}


def _check_grid(volume: Volume, grid: Geometry) -> None:
    remedy = "Predict on the grid of the case's own files: resampling here would change the scores."
    if volume.geometry.shape != grid.shape:
        raise _Unusable("wrong_grid", f"shape {volume.geometry.shape}, the reference has {grid.shape}", remedy)
    if not volume.geometry.matches(grid):
        # Both matrices: a flipped sign or a lost origin is seen at a glance.
        theirs, ours = volume.geometry.affine[:3].tolist(), grid.affine[:3].tolist()
        raise _Unusable("wrong_grid", f"affine {theirs}, the reference has {ours}", remedy)


def _identity(job: Job, method: str, prompt_source: str, region: str, status: str) -> dict[str, Any]:
    return {
        "case_id": job.case.case_id,
        "patient_id": job.case.patient_id,
        "run": job.record.run,
        "method": method,
        "region": region,
        "prompt_source": prompt_source,
        "status": status,
        "postprocess": job.record.postprocess,
    }


def _floor_row(job: Job, reference: np.ndarray, geometry: Geometry, status: str) -> dict[str, Any]:
    boxes = job.boxes or ()
    # A case that was never predicted has no boxes in prompts.csv either; no boxes for a predicted case are none.
    lost = not boxes and status == "missing"
    row = _identity(job, FLOOR, job.floor_source, FLOOR_REGION, "missing" if lost else "ok")
    if lost:
        return row | failed_scores(reference, geometry, job.challenge)
    return row | region_scores(Comparison(reference, fill_boxes(boxes, geometry), geometry), job.challenge)


def _finding(case: CaseRecord, file: str, code: str, detail: str, remedy: str | None) -> Finding:
    return Finding(case.case_id, file, code, "error", detail, remedy or "")
