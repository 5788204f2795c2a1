"""Reading NIfTI files whole or not at all, and writing them so that every reader agrees on where they stand.

The readers raise the first fault that `examine` finds and that makes a file unusable, and log the others.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.examine import MAX_BYTES, TOLERATED, Reading, examine, examine_header, open_header
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.records import Volume

__all__ = ["MAX_BYTES", "read_header", "read_label_map", "read_volume", "write_image", "write_label_map"]

_log = logging.getLogger(__name__)


def read_header(path: Path, max_bytes: int = MAX_BYTES) -> tuple[nib.Nifti1Image, Geometry]:
    """Read and judge a header; no voxel is loaded.

    Returns
    -------
    image : nibabel.Nifti1Image
        A lazy image.
    geometry : Geometry

    Raises
    ------
    DataError
        With the codes ``missing_file``, ``unreadable``, ``truncated``, ``not_3d``, ``too_large``, ``no_affine``,
        ``sheared_affine``.
    """
    image = open_header(path)
    faults, geometry = examine_header(path, image, max_bytes)
    _raise_first(faults)
    assert geometry is not None  # without one there is a fault, no_affine or not_3d
    return image, geometry


def read_volume(path: Path, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a whole volume, checking the gzip stream to its end.

    Returns
    -------
    Volume
        `array` is int16 where the file stores integers that fit, else float32; C-contiguous is not promised.

    Raises
    ------
    DataError
        As `read_header`, and ``truncated`` or ``unreadable`` where the voxels cannot be read whole.
    """
    return _usable(examine(path, max_bytes))


def read_label_map(path: Path, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a label map as integers.

    Labels stored as scaled floats (0.99999994 for 1) are rounded; what is further than 1e-3 from an integer is an
    error.

    Returns
    -------
    Volume
        `array` of uint8 where the file has that type, else int16 (int64 where a value does not fit), values as in the
        file, not yet canonical.

    Raises
    ------
    DataError
        As `read_volume`, and ``not_integer_labels``.
    """
    return _usable(examine(path, max_bytes, label_map=True))


def write_label_map(path: Path, label_map: np.ndarray, geometry: Geometry) -> None:
    """Write a uint8 label map with equal qform and sform, atomically.

    Parameters
    ----------
    path : Path
        Ending in ``.nii.gz`` or ``.nii``.
    label_map : ndarray of integer or bool, shape geometry.shape
    geometry : Geometry

    Notes
    -----
    nibabel leaves ``qform_code`` at 0, which the BraTS validator refuses; both are set, to 1 (scanner).
    Rewriting the same labels gives the same bytes.
    """
    image = nib.Nifti1Image(np.asarray(label_map, np.uint8), geometry.affine)
    image.header.set_data_dtype(np.uint8)
    write_image(path, image, geometry)


def write_image(path: Path, image: nib.Nifti1Image, geometry: Geometry) -> None:
    """Write a nibabel image atomically with qform and sform of `geometry`."""
    image.set_qform(geometry.affine, 1)
    image.set_sform(geometry.affine, 1)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = gzip.compress(data, compresslevel=6, mtime=0)
    write_bytes_atomically(path, data)


def _usable(reading: Reading) -> Volume:
    _raise_first(reading.faults)
    assert reading.array is not None and reading.geometry is not None  # else there is a fault
    return Volume(reading.array, reading.geometry)


def _raise_first(faults: Sequence[DataError]) -> None:
    for fault in faults:
        if fault.code not in TOLERATED:
            raise fault
    for fault in faults:
        _log.warning("%s", fault)
