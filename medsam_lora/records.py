"""The records that travel between the parts of the package: plain data, no behaviour beyond reading themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medsam_lora.geometry import Geometry


@dataclass(frozen=True)
class CaseRecord:
    """One line of a manifest.

    Parameters
    ----------
    case_id, patient_id : str
    split : str
        ``train``, ``val``, ``test`` or empty.
    files : mapping of str to str
        Modality or ``seg`` to a path relative to the data root; a missing file is not in the mapping.
    label_convention : str
        A key of `labels.CONVENTIONS`.
    sha256 : str
        Of the five files' hex digests, concatenated in column order, a missing one empty.
    """

    case_id: str
    patient_id: str
    split: str
    files: Mapping[str, str]
    label_convention: str
    sha256: str


@dataclass(frozen=True)
class Volume:
    """An array and its placement.

    Parameters
    ----------
    array : ndarray, shape (X, Y, Z) or (C, X, Y, Z)
    geometry : Geometry
        Of the last three axes.
    """

    array: np.ndarray
    geometry: Geometry


@dataclass(frozen=True)
class CaseVolumes:
    """A case as read from its files, on the native grid.

    Parameters
    ----------
    record : CaseRecord
    modalities : tuple of str
        Channel order of `image`.
    image : ndarray of int16 or float32, shape (M, X, Y, Z)
    label_map : ndarray of uint8, shape (X, Y, Z), or None
        Canonical labels; None where the case has no reference.
    geometry : Geometry
    """

    record: CaseRecord
    modalities: tuple[str, ...]
    image: np.ndarray
    label_map: np.ndarray | None
    geometry: Geometry


@dataclass(frozen=True)
class SliceBox:
    """A box prompt on one slice along array axis 2, on voxel edges, half-open.

    Parameters
    ----------
    k : int
        Slice index.
    i0, j0, i1, j1 : float
    """

    k: int
    i0: float
    j0: float
    i1: float
    j1: float


@dataclass(frozen=True)
class Finding:
    """One fault that `verify` found.

    Parameters
    ----------
    case_id, file, code, severity, detail, remedy : str
        `severity` is ``error`` or ``warning``; `file` is relative to the data root, or empty.
    """

    case_id: str
    file: str
    code: str
    severity: str
    detail: str
    remedy: str


@dataclass
class StageOutcome:
    """What a stage did: the cases done, skipped (already there) and failed.

    Parameters
    ----------
    done, skipped : list of str
        Case ids.
    failed : list of Finding
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 where every case is done, 1 where some failed."""
        return 1 if self.failed else 0
