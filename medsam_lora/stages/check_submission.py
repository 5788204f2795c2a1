"""The rules by which the BraTS 2023 challenges accept a folder of predictions, before it is sent."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

import numpy as np

from medsam_lora import labels
from medsam_lora.errors import DataError, MedsamLoraError
from medsam_lora.io.examine import MAX_BYTES, open_header
from medsam_lora.io.nifti import read_label_map
from medsam_lora.progress import track
from medsam_lora.records import Finding

SHAPE: Final = (240, 240, 155)
QFORM: Final = ((-1, 0, 0, 0), (0, -1, 0, 239), (0, 0, 1, 0), (0, 0, 0, 1))
"""Voxel index to mm of the SRI24 grid that every BraTS case stands on."""

LABELS: Final = (0, labels.NETC, labels.SNFH, labels.ET)

# Five digits of the patient and three of the time point end the name; what stands before them is free.
_NAME = re.compile(r"(\d{5}-\d{3})\.nii\.gz")
_KNOWN = re.compile(r"(\d{5}-\d{3})$")


def check_submission(folder: Path, cases: Collection[str] | None = None, max_bytes: int = MAX_BYTES) -> list[Finding]:
    """Check a folder as the challenge checks an archive of it: every file, and every rule of every file.

    Parameters
    ----------
    folder : Path
    cases : collection of str, optional
        Ids of the cases asked for, ending in ``ppppp-ttt``: files of others and cases without a file are findings
        too.
    max_bytes : int
        Cap on the bytes a header may claim.

    Returns
    -------
    list of Finding
        Errors, by file name; empty where the folder is acceptable. Codes: ``not_nii_gz``, ``wrong_name``,
        ``duplicate_case``, ``unknown_case``, ``missing_case``, ``wrong_shape``, ``wrong_qform``,
        ``unexpected_label``, and those of the reader.

    Raises
    ------
    DataError
        Where there is no such folder, or it is empty.
    """
    if not folder.is_dir():
        raise DataError("no such folder of predictions", path=folder, remedy="Check the path.")
    paths = sorted(folder.iterdir())
    if not paths:
        raise DataError("the folder is empty", path=folder, remedy="Write <case_id>.nii.gz files into it.")
    known = None if cases is None else {match[1] for case in cases if (match := _KNOWN.search(case))}
    findings: list[Finding] = []
    owners: dict[str, str] = {}
    for path in track(paths, "check", len(paths)):
        findings += _of_name(path, owners, known)
        if path.is_file() and path.name.endswith(".nii.gz"):
            findings += _of_content(path, max_bytes)
    for absent in sorted((known or set()) - set(owners)):
        findings.append(Finding(absent, "", "missing_case", "error", "no file of this case", "Predict it."))
    return findings


def _of_name(path: Path, owners: dict[str, str], known: set[str] | None) -> list[Finding]:
    if not path.is_file() or not path.name.endswith(".nii.gz"):
        what = "a folder" if path.is_dir() else "no .nii.gz file" if path.is_file() else "a link to nothing"
        return [_finding(path, "not_nii_gz", f"{what}; every file must be one", "Leave it out of the archive.")]
    match = _NAME.search(path.name)
    if match is None or match.end() != len(path.name):
        detail = "the name does not end in ppppp-ttt.nii.gz (five digits, three digits)"
        return [_finding(path, "wrong_name", detail, "Name it as the case, such as BraTS-MEN-00004-000.nii.gz.")]
    case = match[1]
    found = []
    if case in owners:
        found.append(_finding(path, "duplicate_case", f"{owners[case]} is of the case {case} too", "Keep one."))
    owners.setdefault(case, path.name)
    if known is not None and case not in known:
        found.append(_finding(path, "unknown_case", f"no case {case} was asked for", "Leave it out."))
    return found


def _of_content(path: Path, max_bytes: int) -> list[Finding]:
    try:
        header = open_header(path).header
    except MedsamLoraError as error:
        return [_fault(path, error)]
    found = []
    shape = tuple(int(n) for n in header.get_data_shape())
    if shape != SHAPE:
        remedy = "Predict on the grid of the case's own files; do not crop or resample."
        found.append(_finding(path, "wrong_shape", f"shape {shape}, it must be {SHAPE}", remedy))
    # Exactly, as the challenge compares, and whatever its code; the sform, which most programs read, is not looked at.
    qform = np.asarray(header.get_qform())
    if not np.array_equal(qform, QFORM):
        detail = f"qform {qform.tolist()} (code {int(header['qform_code'])}), it must be {np.array(QFORM).tolist()}"
        remedy = "Write the affine of the case's own files as qform too."
        found.append(_finding(path, "wrong_qform", detail, remedy))
    try:
        array = read_label_map(path, max_bytes).array
    except MedsamLoraError as error:
        return [*found, _fault(path, error)]
    values, counts = np.unique(array, return_counts=True)
    strange = [f"{v} ({n} voxels)" for v, n in zip(values.tolist(), counts.tolist(), strict=True) if v not in LABELS]
    if strange:
        remedy = "Write 1 NETC, 2 SNFH, 3 ET; up to 2022 enhancing tumour was 4."
        found.append(_finding(path, "unexpected_label", f"labels {', '.join(strange)}; they must be 0 to 3", remedy))
    return found


def _fault(path: Path, error: MedsamLoraError) -> Finding:
    return _finding(path, error.code or "unreadable", error.message, error.remedy or "Write the file again.")


def _finding(path: Path, code: str, detail: str, remedy: str) -> Finding:
    return Finding(path.name.removesuffix(".nii.gz"), path.name, code, "error", detail, remedy)
