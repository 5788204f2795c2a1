"""Scoring of one case: its prediction against its original label file, and the floor of filled boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from medsam_lora.metrics.boxes import around, bounding_box
from medsam_lora.metrics.overlap import Comparison
from medsam_lora.metrics.per_case import failed_nnunet_metrics, failed_scores, nnunet_metrics, region_scores
from medsam_lora.prompts.sources import fill_boxes
from medsam_lora.records import CaseRecord, Finding, SliceBox, Volume

FLOOR = "filled_box"
"""Method name of the floor: every box filled, and scored as if it were each region."""

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
    file = prediction_path(job.folder, job.case.case_id)
    pairs, status = None, "ok"
    try:
        prediction, meanings = _read_prediction(file, job, reference.geometry)
        pairs = compare(canonical, prediction, meanings, job.regions, reference.geometry)
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
    for region in job.regions:
        row = _identity(job, job.record.method, job.record.prompt_source, region, status)
        row["postprocess"] = job.record.postprocess
        if pairs is None:
            mask = labels.region_mask(canonical, region)
            row |= failed_scores(mask, reference.geometry, job.challenge)
            entry["metrics"][region] = failed_nnunet_metrics(mask)
        else:
            row |= region_scores(pairs[region], job.challenge)
            entry["metrics"][region] = nnunet_metrics(pairs[region].counts)
        scores.rows.append(row)
    scores.entry = entry
    if job.boxes is not None:
        scores.floor_rows += _floor_rows(job, canonical, reference.geometry, status)
    return scores


def compare(
    reference: np.ndarray,
    prediction: np.ndarray,
    meanings: Mapping[int, frozenset[int]],
    regions: Sequence[str],
    geometry: Geometry,
) -> dict[str, Comparison]:
    """Reference and prediction of a case, region by region, within the box outside which both are empty.

    Parameters
    ----------
    reference : ndarray of integer, shape geometry.shape
        Canonical labels.
    prediction : ndarray of integer, shape geometry.shape
    meanings : mapping of int to frozenset of int
        The canonical labels that every value of the prediction stands for (`io.predictions.meanings_for`).
    regions : sequence of str
    geometry : Geometry
        The native grid.

    Returns
    -------
    dict of str to Comparison
        Of every score that of the whole volume: the voxels cut off are counted as true negatives.
    """
    # A tumour fills a tenth of a volume: everything is several times faster on the box around it, and the same.
    boxes = [box for shown in (reference, prediction) if (box := bounding_box(shown != 0)) is not None]
    box = around(boxes) if boxes else (slice(0, 1),) * 3
    grid = geometry.cropped([s.start for s in box], [s.stop for s in box])
    ours, theirs = np.ascontiguousarray(reference[box]), np.ascontiguousarray(prediction[box])
    outside = reference.size - ours.size
    return {
        region: Comparison(
            labels.region_mask(ours, region), predicted_mask(theirs, region, meanings), grid, n_outside=outside
        )
        for region in regions
    }


class _Unusable(Exception):
    """A prediction that becomes a failed row."""

    def __init__(self, status: str, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.remedy = status, reason, remedy


def _read_prediction(file: Path | None, job: Job, grid: Geometry) -> tuple[np.ndarray, Mapping[int, frozenset[int]]]:
    """A label map on the reference's grid, and what its values mean."""
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
    return volume.array, meanings


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
        "postprocess": "none",
    }


def _floor_rows(job: Job, canonical: np.ndarray, grid: Geometry, status: str) -> list[dict[str, Any]]:
    boxes = job.boxes or ()
    # A case that was never predicted has no boxes in prompts.csv either; no boxes for a predicted case are none.
    lost = not boxes and status == "missing"
    # The boxes are the whole tumour's, and a model makes every region from them: the floor of each is the same box,
    # filled with the label that belongs to all regions.
    filled = fill_boxes(boxes, grid) * np.uint8(labels.ET)
    pairs = {} if lost else compare(canonical, filled, {labels.ET: frozenset({labels.ET})}, job.regions, grid)
    rows = []
    for region in job.regions:
        row = _identity(job, FLOOR, job.floor_source, region, "missing" if lost else "ok")
        if lost:
            row |= failed_scores(labels.region_mask(canonical, region), grid, job.challenge)
        else:
            row |= region_scores(pairs[region], job.challenge)
        rows.append(row)
    return rows


def _finding(case: CaseRecord, file: str, code: str, detail: str, remedy: str | None) -> Finding:
    return Finding(case.case_id, file, code, "error", detail, remedy or "")
