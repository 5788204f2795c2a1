"""Everything that can be wrong with one case: the one list of checks behind `verify` and `read_case`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from medsam_lora.errors import DataError, ManifestError
from medsam_lora.geometry import GRID_TOLERANCE, Geometry
from medsam_lora.io.examine import MAX_BYTES, examine
from medsam_lora.io.findings import finding, finding_of
from medsam_lora.io.manifest import case_findings, case_path
from medsam_lora.io.voxels import Allocate
from medsam_lora.labels import CONVENTIONS, MODALITIES, to_canonical
from medsam_lora.records import CaseRecord, Finding, Volume

NonFinite = Literal["reject", "zero"]


@dataclass
class CaseCheck:
    """A case as far as it can be read, and all that is wrong with it.

    Parameters
    ----------
    findings : list of Finding
        Manifest line first, then file by file, then the files beside each other.
    volumes : dict of str to Volume
        By modality or ``seg``; only files that could be read. Images are int16 or float32 on the native grid, with
        non-finite voxels set to 0 where that was asked for; the label map is uint8 and canonical.
    blank : set of str
        Keys of the files that hold nothing but zeros.
    """

    findings: list[Finding] = field(default_factory=list)
    volumes: dict[str, Volume] = field(default_factory=dict)
    blank: set[str] = field(default_factory=set)


def check_case(
    record: CaseRecord,
    root: Path,
    modalities: Sequence[str] = MODALITIES,
    *,
    max_bytes: int = MAX_BYTES,
    nonfinite: NonFinite = "reject",
    allocate: Allocate | None = None,
) -> CaseCheck:
    """Read a case and list everything that is wrong with it.

    Parameters
    ----------
    record : CaseRecord
    root : Path
        Data root.
    modalities : sequence of str
        The modalities to look at; the reference is always looked at.
    max_bytes : int
        Cap on the bytes a header may claim.
    nonfinite : {"reject", "zero"}
        Whether NaN and infinite voxels are an error, or set to 0 with a warning.
    allocate : callable, optional
        Where the inflated images are to lie (`voxels.Allocate`).

    Returns
    -------
    CaseCheck
    """
    check = CaseCheck(case_findings(record))
    geometries: dict[str, Geometry] = {}
    for key in (*modalities, "seg"):
        file = record.files.get(key, "")
        if not file:
            check.findings.append(_absent(record, key))
            continue
        try:
            path = case_path(record, key, root)
        except ManifestError as error:
            # A path that is wrong in itself was found with the manifest line; only links are news.
            news = finding("path_outside_root", record.case_id, error.message, error.remedy or "", file=file)
            if not any((f.code, f.file) == (news.code, file) for f in check.findings):
                check.findings.append(news)
            continue
        reading = examine(path, max_bytes, label_map=key == "seg", allocate=None if key == "seg" else allocate)
        check.findings += [finding_of(fault, record.case_id, file) for fault in reading.faults]
        if reading.geometry is not None:
            geometries[key] = reading.geometry
        if reading.array is None:
            continue
        if _is_blank(reading.array):
            check.blank.add(key)
        if key == "seg":
            array = _check_label_map(check, record, reading.array)
        else:
            array = _check_image(check, record, key, reading.array, nonfinite)
        if array is not None and reading.geometry is not None:
            check.volumes[key] = Volume(array, reading.geometry)
    check.findings += _grid_findings(record, geometries)
    if not any(record.files.get(key) for key in MODALITIES):
        detail, remedy = "the manifest lists no image of this case", "Add its modalities, or remove the line."
        check.findings.append(finding("missing_modality", record.case_id, detail, remedy, severity="error"))
    return check


def _absent(record: CaseRecord, key: str) -> Finding:
    if key == "seg":
        remedy = "None needed for prediction; to train or score on the case, add its reference to the manifest."
        return finding("missing_reference", record.case_id, "the manifest lists no reference", remedy)
    remedy = f"Add {key} to the manifest, or use the case without it (data.modalities)."
    return finding("missing_modality", record.case_id, f"the manifest lists no {key}", remedy)


def _check_image(
    check: CaseCheck, record: CaseRecord, key: str, array: np.ndarray, nonfinite: NonFinite
) -> np.ndarray | None:
    file = record.files[key]
    if array.dtype.kind == "f":
        bad = np.isfinite(array)
        np.logical_not(bad, out=bad)
        if count := int(np.count_nonzero(bad)):
            i, j, k = (int(v) for v in np.argwhere(bad)[0])
            detail = f"{count} voxels are NaN or infinite, the first at ({i}, {j}, {k})"
            reject = nonfinite == "reject"
            remedy = "Correct the file, or set data.nonfinite to zero." if reject else "They are read as 0."
            severity = "error" if reject else "warning"
            check.findings.append(finding("nonfinite", record.case_id, detail, remedy, file=file, severity=severity))
            array = np.where(bad, np.float32(0), array)
    if _is_blank(array):
        remedy = "Restore the file, or empty its cell in the manifest to use the case without it."
        check.findings.append(finding("all_zero", record.case_id, "every voxel is 0", remedy, file=file))
    return array


def _is_blank(array: np.ndarray) -> bool:
    # The middle first: it answers for nearly every file, and a whole volume takes as long as inflating a tenth of it.
    return not (array[..., array.shape[-1] // 2].any() or array.any())


def _check_label_map(check: CaseCheck, record: CaseRecord, array: np.ndarray) -> np.ndarray | None:
    if record.label_convention not in CONVENTIONS:
        return None  # said already, with the manifest line
    try:
        label_map = to_canonical(array, record.label_convention, contiguous=False)
    except DataError as fault:
        check.findings.append(finding_of(fault, record.case_id, record.files["seg"]))
        return None
    if _is_blank(label_map):
        detail = "the reference marks no tumour"
        remedy = "Right for a case without tumour; otherwise restore the reference."
        check.findings.append(finding("empty_reference", record.case_id, detail, remedy, file=record.files["seg"]))
    return label_map


def _grid_findings(record: CaseRecord, geometries: Mapping[str, Geometry]) -> list[Finding]:
    """Files that do not stand on the grid that most files of the case share."""
    if not geometries:
        return []
    # The commonest grid, so that one odd file is named rather than the four it differs from; the first on a tie.
    agreeing = {key: sum(g.matches(other) for other in geometries.values()) for key, g in geometries.items()}
    model = max(agreeing, key=lambda key: agreeing[key])
    found = []
    for key, geometry in geometries.items():
        file = record.files[key]
        if geometry.shape != geometries[model].shape:
            detail = f"shape {geometry.shape}, that of {model} is {geometries[model].shape}"
            remedy = "Resample it onto the grid of the other files."
            found.append(finding("shape_mismatch", record.case_id, detail, remedy, file=file))
        shift = geometries[model].displacement_voxels(geometry)
        if shift > GRID_TOLERANCE:
            detail = f"the affine places voxels up to {shift:.3g} voxels from those of {model}"
            remedy = "Resample it onto the grid of the other files, or correct its header."
            found.append(finding("affine_mismatch", record.case_id, detail, remedy, file=file))
    return found
