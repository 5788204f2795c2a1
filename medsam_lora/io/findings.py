"""The codes of everything that can be wrong with a manifest, a case or a file, and how severe each is.

What each code means and what to do about it is written in `docs/findings.md`; a test keeps the two in step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from medsam_lora.errors import DataError
from medsam_lora.records import Finding

SEVERITIES: Final[Mapping[str, str]] = {
    # the manifest
    "bad_case_id": "error",
    "bad_patient_id": "error",
    "bad_sha256": "error",
    "duplicate_case": "error",
    "path_outside_root": "error",
    "patient_in_two_splits": "error",
    "unknown_convention": "error",
    "unknown_split": "error",
    # one file
    "missing_file": "error",
    "missing_modality": "warning",
    "missing_reference": "warning",
    "unreadable": "error",
    "truncated": "error",
    "trailing_junk": "warning",
    "not_3d": "error",
    "too_large": "error",
    "no_affine": "error",
    "sheared_affine": "error",
    "qform_sform_mismatch": "warning",
    "nonfinite": "error",
    "all_zero": "error",
    "not_integer_labels": "error",
    "unexpected_label": "error",
    "empty_reference": "warning",
    # the files of a case beside each other
    "shape_mismatch": "error",
    "affine_mismatch": "error",
    # cases beside each other, and beside what the manifest says of them
    "duplicate_file": "error",
    "hash_mismatch": "error",
    # the check itself
    "check_failed": "error",
}
"""Every finding code and its severity, ``error`` or ``warning``: an error makes the case unusable."""


def finding(
    code: str, case_id: str, detail: str, remedy: str, *, file: str = "", severity: str | None = None
) -> Finding:
    """A finding of the severity that belongs to its code, unless another is given.

    Parameters
    ----------
    code : str
        A key of `SEVERITIES`.
    case_id, detail, remedy : str
    file : str
        Relative to the data root; empty where no single file is meant.
    severity : str, optional

    Examples
    --------
    >>> finding("missing_reference", "a", "no reference", "Add one.").severity
    'warning'
    """
    return Finding(case_id, file, code, severity or SEVERITIES[code], detail, remedy)


def finding_of(fault: DataError, case_id: str, file: str) -> Finding:
    """The finding that says what an error of a reader says."""
    return finding(fault.code or "unreadable", case_id, fault.message, fault.remedy or "", file=file)
