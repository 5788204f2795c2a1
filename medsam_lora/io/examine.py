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
from medsam_lora.io.inflate import GZIP_MAGIC, OverBudget, inflate

MAX_BYTES = 2 * 1024**3
"""Default cap on the bytes that a header may claim, before anything is loaded."""

TOLERATED = frozenset({"trailing_junk", "qform_sform_mismatch"})
"""Codes of faults with which a file is still read."""

# What may follow the voxels before a file counts as a decompression bomb.
_SLACK_BYTES = 2**20

_COPY_AGAIN = "Copy the file again from its source."
_CONVERT_AGAIN = "Convert the image again from DICOM with its orientation."
_HEADER_ERRORS = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
    OSError,
    ValueError,
    OverflowError,
)


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


def examine(path: Path, max_bytes: int = MAX_BYTES, *, label_map: bool = False) -> Reading:
    """Read a file and list every fault of it.

    Parameters
    ----------
    path : Path
    max_bytes : int
        Cap on the bytes the header may claim; nothing is loaded beyond it.
    label_map : bool
        Whether the voxels must be integers; the array is then int16, or int64 where the values do not fit.

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
            array, junk = _voxels(path, image)
            faults += junk
            array = _as_labels(path, array) if label_map else _as_image(array)
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
        raise _unreadable(path, f"cannot be opened ({_first_line(error)})", "Check its permissions.") from error
    if not start:
        raise _unreadable(path, "the file is empty")
    zipped, named = start.startswith(GZIP_MAGIC), path.name.lower().endswith(".gz")
    if named and not zipped:
        if start[344:348] == b"n+1\0":
            raise _unreadable(
                path, "named .gz, but a NIfTI file that is not compressed", "Rename it to .nii, or compress it."
            )
        raise _unreadable(path, "named .gz, but not compressed with gzip")
    if zipped and not named:
        raise _unreadable(path, "compressed with gzip, but not named .gz", "Rename it to .nii.gz, or inflate it.")
    try:
        # nibabel tells of every header it repairs on standard error; what matters becomes a fault here.
        with nib.imageglobals.LoggingOutputSuppressor():
            return nib.Nifti1Image.from_filename(path)
    except EOFError as error:
        raise _truncated(path, "the gzip stream ends within the header") from error
    except (*_HEADER_ERRORS, zlib.error) as error:
        raise _unreadable(path, f"not a readable NIfTI-1 file ({_first_line(error)})") from error


def examine_header(path: Path, image: nib.Nifti1Image, max_bytes: int) -> tuple[list[DataError], Geometry | None]:
    """Every fault of a header, and the geometry where it gives one; no voxel is loaded."""
    faults: list[DataError] = []
    shape = image.shape[:3] if len(image.shape) == 4 and image.shape[3] == 1 else image.shape
    if len(shape) != 3:
        message = f"the image has {len(shape)} axes, shape {shape}; three are needed"
        faults.append(DataError(message, path=path, remedy="Split it into one 3-D file per modality.", code="not_3d"))
    dtype = np.dtype(image.get_data_dtype())
    if min(shape) < 1:
        faults.append(_unreadable(path, f"the header claims a shape of {shape}"))
    if dtype.kind not in "iuf":
        faults.append(_unreadable(path, f"voxels of type {dtype} are not intensities", "Store integers or floats."))
    claimed = _claimed_bytes(image)
    if claimed > max_bytes:
        message = f"the header claims a shape of {shape}, {_gib(claimed)}, over the cap of {_gib(max_bytes)}"
        faults.append(
            DataError(message, path=path, remedy="Correct the file, or raise data.max_gib.", code="too_large")
        )
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


def _claimed_bytes(image: nib.Nifti1Image) -> int:
    # Python integers: the product of a forged header overflows int64.
    claimed = int(np.dtype(image.get_data_dtype()).itemsize)
    for n in image.shape:
        claimed *= max(int(n), 0)
    return claimed + _proxy(image).offset


def _proxy(image: nib.Nifti1Image) -> nib.arrayproxy.ArrayProxy:
    assert isinstance(image.dataobj, nib.arrayproxy.ArrayProxy)  # an image read from a file has no other
    return image.dataobj


def _voxels(path: Path, image: nib.Nifti1Image) -> tuple[np.ndarray, list[DataError]]:
    """The voxels as stored, or as float32 where they are scaled, and what follows them in the file."""
    expected = _claimed_bytes(image)
    raw, junk = _contents(path, expected)
    if len(raw) < expected:
        raise _truncated(path, f"the voxels end early ({len(raw)} of {expected} bytes)")
    junk += len(raw) - expected
    try:
        with nib.imageglobals.LoggingOutputSuppressor():
            proxy = _proxy(nib.Nifti1Image.from_bytes(raw))
        # Scaling to float32 halves the peak of nibabel's default, float64.
        plain = (proxy.slope, proxy.inter) == (1.0, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            array = proxy.get_unscaled() if plain else np.asarray(proxy, np.float32)
    except (*_HEADER_ERRORS, EOFError) as error:
        raise _truncated(path, f"the voxels end early ({_first_line(error)})") from error
    array = np.asarray(array).reshape(array.shape[:3])
    message = f"{junk} bytes follow the voxels"
    remedy = "Harmless in itself; compare the file with its source."
    faults = [DataError(message, path=path, remedy=remedy, code="trailing_junk")] if junk else []
    return array, faults


def _as_image(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iu" and _fits_int16(array):
        return np.asarray(array, np.int16)
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def _fits_int16(array: np.ndarray) -> bool:
    limits = np.iinfo(np.int16)
    return array.dtype.itemsize == 1 or bool(array.min() >= limits.min and array.max() <= limits.max)


def _contents(path: Path, expected: int) -> tuple[bytes, int]:
    """The bytes of a file, inflated, and how many belong to nothing; at most `expected` and some slack are read."""
    budget = expected + _SLACK_BYTES
    try:
        if not path.name.lower().endswith(".gz"):
            with path.open("rb") as handle:
                raw = handle.read(expected)
            return raw, max(path.stat().st_size - expected, 0)
        if path.stat().st_size > budget + budget // 8:
            raise OverBudget("even compressed")  # deflate never adds an eighth
        return inflate(path.read_bytes(), budget)
    except OverBudget as error:
        message = f"the file inflates to more than {_gib(budget)}, its header claims {_gib(expected)}"
        remedy = "Do not trust the file; copy it again from its source."
        raise DataError(message, path=path, remedy=remedy, code="too_large") from error
    except EOFError as error:
        raise _truncated(path, f"the gzip stream is cut ({_first_line(error)})") from error
    except (OSError, zlib.error) as error:
        raise _unreadable(path, f"the gzip stream is damaged ({_first_line(error)})") from error


def _as_labels(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iu":
        return array.astype(np.int16 if _fits_int16(array) else np.int64, copy=False)
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
    return rounded.astype(np.int16 if _fits_int16(rounded) else np.int64)


def _unreadable(path: Path, message: str, remedy: str = _COPY_AGAIN) -> DataError:
    return DataError(message, path=path, remedy=remedy, code="unreadable")


def _truncated(path: Path, message: str) -> DataError:
    return DataError(message, path=path, remedy=_COPY_AGAIN, code="truncated")


def _rows(affine: np.ndarray | None) -> str:
    if affine is None:
        return "(not a rotation)"
    return "[" + "; ".join(" ".join(f"{value:g}" for value in row) for row in affine[:3]) + "]"


def _gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
