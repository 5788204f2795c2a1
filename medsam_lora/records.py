"""The records that travel between the parts of the package: plain data, no behaviour beyond reading themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        Of the whole volume.
    planes : tuple of int or None
        Where not the whole image was read, which planes along array axis 2 its last axis holds; the label map is whole.
    """

    record: CaseRecord
    modalities: tuple[str, ...]
    image: np.ndarray
    label_map: np.ndarray | None
    geometry: Geometry
    planes: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class PreparedSlices:
    """Transverse slices of a case, oriented and cropped, the voxels as in the file (the z-score is applied at load).

    Parameters
    ----------
    case_id, patient_id, split : str
    modalities : tuple of str
        Channel order of `image`.
    image : ndarray of int16 or float32, shape (N, M, X, Y)
        Raw voxels; a read-only memory map where it comes from a store.
    label : ndarray of uint8, shape (N, X, Y), or None
        Canonical labels; None where the case has no reference.
    ks : tuple of int
        Of every slice, its index along Z of `crop`, ascending.
    mean, std : ndarray of float64, shape (N, M)
        What `transforms.intensity.zscore` subtracts and divides by.
    voxels : str
        A key of `transforms.NORMALISATIONS`.
    native : Geometry
        The grid of the files.
    crop : Geometry
        The whole oriented and cropped volume; slice `n` stands at ``crop.at_slice(ks[n])``.
    report : mapping of str to int or None
        ``brain_voxels``, ``brain_voxels_lost``, ``tumour_voxels``, ``tumour_voxels_lost``: over the whole volume,
        lost to the crop; those of tumour None where the case has no reference, those of the brain None where not
        the whole image was read.
    """

    case_id: str
    patient_id: str
    split: str
    modalities: tuple[str, ...]
    image: np.ndarray
    label: np.ndarray | None
    ks: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    voxels: str
    native: Geometry
    crop: Geometry
    report: Mapping[str, Any]


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
