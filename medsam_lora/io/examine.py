"""Everything wrong with a NIfTI file, found without trusting it.

nibabel reads (RAS+, lazily); SimpleITK is never the first reader, as it reads truncated and bit-flipped
``.nii.gz`` files without an error. A header is judged before a voxel is loaded, and a gzip is read to its end, CRC
and length included, before a voxel is believed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.geometry import GRID_TOLERANCE, Geometry
from medsam_lora.io.inflate import GZIP_MAGIC
from medsam_lora.io.voxels import (
    HEADER_ERRORS,
    Allocate,
    as_image,
    claimed_bytes,
    first_line,
    fits_int16,
    gib,
    read_voxels,
    truncated,
    unreadable,
)

MAX_BYTES = 2 * 1024**3
"""Default cap on the bytes that a header may claim, before anything is loaded."""

TOLERATED = frozenset({"trailing_junk", "qform_sform_mismatch"})
"""Codes of faults with which a file is still read."""

_CONVERT_AGAIN = "Convert the image again from DICOM with its orientation."


@dataclass(frozen=True)
class Reading:
    """What a file holds, as far as it can be read, and every fault of it.

    Parameters
    ----------
    array : ndarray, shape (X, Y, Z), or None
        None where the voxels cannot be read.
    geometry : Geometry or None
        None where the file does not say where it stands.
    faults : tuple of DataError
        Not raised; those with a code in `TOLERATED` are warnings.
    """

    array: np.ndarray | None
    geometry: Geometry | None
    faults: tuple[DataError, ...]


def examine(
    path: Path, max_bytes: int = MAX_BYTES, *, label_map: bool = False, allocate: Allocate | None = None
) -> Reading:
    """Read a file and list every fault of it.

    Parameters
    ----------
    path : Path
    max_bytes : int
        Cap on the bytes the header may claim; nothing is loaded beyond it.
    label_map : bool
        Whether the voxels must be integers; the array is then uint8 as in the file, or int16, or
        int64 where the values do not fit.
    allocate : callable, optional
        Where the inflated file is to lie (`voxels.Allocate`).

    Returns
    -------
    Reading
        With the codes ``missing_file``, ``unreadable``, ``truncated``, ``trailing_junk``, ``not_3d``, ``too_large``,
        ``no_affine``, ``sheared_affine``, ``qform_sform_mismatch`` and, for a label map, ``not_integer_labels``.
    """
    try:
        image = open_header(path)
    except DataError as fault:
        return Reading(None, None, (fault,))
    faults, geometry = examine_header(path, image, max_bytes)
    array = None
    if not {fault.code for fault in faults} & {"not_3d", "too_large", "unreadable"}:
        try:
            array, junk = read_voxels(path, image) if allocate is None else read_voxels(path, image, allocate)
            faults += junk
            array = _as_labels(path, array) if label_map else as_image(array)
        except DataError as fault:
            array = None
            faults.append(fault)
    return Reading(array, geometry, tuple(faults))


def open_header(path: Path) -> nib.Nifti1Image:
    """Open a file lazily, judging only whether it is a NIfTI-1 file.

    Raises
    ------
    DataError
        With the codes ``missing_file``, ``unreadable``, ``truncated``.
    """
    if not path.is_file():
        raise DataError("no such file", path=path, remedy="Check the manifest and --root.", code="missing_file")
    try:
        with path.open("rb") as handle:
            start = handle.read(352)
    except OSError as error:
        raise unreadable(path, f"cannot be opened ({first_line(error)})", "Check its permissions.") from error
    if not start:
        raise unreadable(path, "the file is empty")
    zipped, named = start.startswith(GZIP_MAGIC), path.name.lower().endswith(".gz")
    if named and not zipped:
        if start[344:348] == b"n+1\0":
            raise unreadable(
                path, "named .gz, but a NIfTI file that is not compressed", "Rename it to .nii, or compress it."
            )
        raise unreadable(path, "named .gz, but not compressed with gzip")
    if zipped and not named:
        raise unreadable(path, "compressed with gzip, but not named .gz", "Rename it to .nii.gz, or inflate it.")
    try:
        # nibabel tells of every header it repairs on standard error; what matters becomes a fault here.
        with nib.imageglobals.LoggingOutputSuppressor():
            return nib.Nifti1Image.from_filename(path)
    except EOFError as error:
        raise truncated(path, "the gzip stream ends within the header") from error
    except (*HEADER_ERRORS, zlib.error) as error:
        raise unreadable(path, f"not a readable NIfTI-1 file ({first_line(error)})") from error


def examine_header(path: Path, image: nib.Nifti1Image, max_bytes: int) -> tuple[list[DataError], Geometry | None]:
    """Every fault of a header, and the geometry where it gives one; no voxel is loaded."""
    faults: list[DataError] = []
    shape = image.shape[:3] if len(image.shape) == 4 and image.shape[3] == 1 else image.shape
    if len(shape) != 3:
        message = f"the image has {len(shape)} axes, shape {shape}; three are needed"
        faults.append(DataError(message, path=path, remedy="Split it into one 3-D file per modality.", code="not_3d"))
    dtype = np.dtype(image.get_data_dtype())
    if min(shape) < 1:
        faults.append(unreadable(path, f"the header claims a shape of {shape}"))
    if dtype.kind not in "iuf":
        faults.append(unreadable(path, f"voxels of type {dtype} are not intensities", "Store integers or floats."))
    claimed = claimed_bytes(image)
    if claimed > max_bytes:
        message = f"the header claims a shape of {shape}, {gib(claimed)}, over the cap of {gib(max_bytes)}"
        faults.append(DataError(message, path=path, remedy="Correct the file, or raise data.maxgib.", code="too_large"))
    affine_faults, geometry = _affine_faults(path, image, shape)
    return faults + affine_faults, geometry


def _affine_faults(
    path: Path, image: nib.Nifti1Image, shape: tuple[int, ...]
) -> tuple[list[DataError], Geometry | None]:
    header = image.header
    codes = int(header["qform_code"]), int(header["sform_code"])
    if codes == (0, 0):
        message = "the header holds no affine (sform_code and qform_code are 0), so its place in the patient is unknown"
        return [DataError(message, path=path, remedy=_CONVERT_AGAIN, code="no_affine")], None
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        message = "the affine is singular or not finite"
        return [DataError(message, path=path, remedy=_CONVERT_AGAIN, code="no_affine")], None
    if len(shape) != 3 or min(shape) < 1:
        return [], None
    geometry = Geometry((int(shape[0]), int(shape[1]), int(shape[2])), image.affine)
    faults = []
    if not geometry.is_orthogonal:
        message = "the affine is sheared; ITK and 3D Slicer cannot open it"
        remedy = "Resample the image onto an orthogonal grid."
        faults.append(DataError(message, path=path, remedy=remedy, code="sheared_affine"))
    if min(codes) > 0:
        other = _qform(header)
        if other is None or geometry.displacement_voxels(Geometry(geometry.shape, other)) > GRID_TOLERANCE:
            message = f"qform {_rows(other)} and sform {_rows(image.affine)} differ; the sform is used"
            remedy = "Find out which is right and set both to it."
            faults.append(DataError(message, path=path, remedy=remedy, code="qform_sform_mismatch"))
    return faults, geometry


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    try:
        return header.get_qform()
    except (ValueError, nib.spatialimages.HeaderDataError):
        return None  # its quaternion is no rotation


def _as_labels(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind in "iu":
        return array.astype(np.int16 if fits_int16(array) else np.int64, copy=False)
    with np.errstate(invalid="ignore"):
        rounded = np.rint(array)
        odd = ~(np.abs(array - rounded) <= 1e-3) | (np.abs(array) > np.iinfo(np.int32).max)
    if odd.any():
        examples = ", ".join(f"{value:g}" for value in np.unique(array[odd])[:3])
        raise DataError(
            f"the label map holds values that are not integers ({int(odd.sum())} voxels, such as {examples})",
            path=path,
            remedy="Write labels with nearest-neighbour resampling and an integer type.",
            code="not_integer_labels",
        )
    return rounded.astype(np.int16 if fits_int16(rounded) else np.int64)


def _rows(affine: np.ndarray | None) -> str:
    if affine is None:
        return "(not a rotation)"
    return "[" + "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3]) + "]"
