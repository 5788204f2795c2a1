"""Reading NIfTI files without trusting them, and writing them so that every reader agrees on where they stand.

nibabel reads (RAS+, lazily); SimpleITK is never the first reader, as it reads truncated and bit-flipped
``.nii.gz`` files without an error. A gzip is read to its end, CRC and length included, before a voxel is believed.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.records import Volume

MAX_BYTES = 2 * 1024**3
"""Default cap on the bytes that a header may claim, before anything is loaded."""

_COPY_AGAIN = "Copy the file again from its source."


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
        With the codes ``missing_file``, ``unreadable``, ``not_3d``, ``too_large``, ``no_affine``, ``sheared_affine``.
    """
    if not path.is_file():
        raise DataError("no such file", path=path, remedy="Check the manifest and --root.", code="missing_file")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", path=path, remedy=_COPY_AGAIN, code="unreadable")
    try:
        image = nib.Nifti1Image.from_filename(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(
            f"not a readable NIfTI file ({_first_line(error)})", path=path, remedy=_COPY_AGAIN, code="unreadable"
        ) from error
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3:
        raise DataError(
            f"the image has {len(shape)} axes, shape {shape}; three are needed",
            path=path,
            remedy="Split it into one 3-D file per modality.",
            code="not_3d",
        )
    # Python integers: the product of a forged header overflows int64.
    claimed = int(np.dtype(image.get_data_dtype()).itemsize)
    for n in shape:
        claimed *= int(n)
    if claimed > max_bytes or min(shape) < 1:
        raise DataError(
            f"the header claims a shape of {shape}, {claimed / 2**30:.1f} GiB, over the cap of "
            f"{max_bytes / 2**30:.1f} GiB",
            path=path,
            remedy="Correct the file, or raise data.max_gib.",
            code="too_large",
        )
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise DataError(
            "the header holds no affine (sform_code and qform_code are 0), so its place in the patient is unknown",
            path=path,
            remedy="Convert the image again from DICOM with its orientation.",
            code="no_affine",
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise DataError(
            "the affine is singular or not finite",
            path=path,
            remedy="Convert the image again from DICOM with its orientation.",
            code="no_affine",
        )
    geometry = Geometry((int(shape[0]), int(shape[1]), int(shape[2])), image.affine)
    if not geometry.is_orthogonal:
        raise DataError(
            "the affine is sheared; ITK and 3D Slicer cannot open it",
            path=path,
            remedy="Resample the image onto an orthogonal grid.",
            code="sheared_affine",
        )
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
    _, geometry = read_header(path, max_bytes)
    raw = _read_bytes(path, max_bytes)
    try:
        full = nib.Nifti1Image.from_bytes(raw)
        array = np.asanyarray(full.dataobj)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"the voxel data end early ({_first_line(error)})", path=path, remedy=_COPY_AGAIN, code="truncated"
        ) from error
    array = array.reshape(geometry.shape)
    if array.dtype.kind in "iub" and (
        array.dtype.itemsize == 1 or (array.size and array.min() >= -32768 and array.max() <= 32767)
    ):
        return Volume(np.asarray(array, np.int16), geometry)
    return Volume(np.asarray(array, np.float32), geometry)


def read_label_map(path: Path, max_bytes: int = MAX_BYTES) -> Volume:
    """Read a label map as integers.

    Labels stored as scaled floats (0.99999994 for 1) are rounded; what is further than 1e-3 from an integer is an
    error.

    Returns
    -------
    Volume
        `array` of int16, values as in the file (not yet canonical).

    Raises
    ------
    DataError
        As `read_volume`, and ``not_integer_labels``.
    """
    volume = read_volume(path, max_bytes)
    if volume.array.dtype == np.int16:
        return volume
    rounded = np.rint(volume.array)
    if not np.isfinite(volume.array).all() or np.abs(volume.array - rounded).max() > 1e-3:
        raise DataError(
            "the label map holds values that are not integers",
            path=path,
            remedy="Write labels with nearest-neighbour resampling and an integer type.",
            code="not_integer_labels",
        )
    return Volume(rounded.astype(np.int16), volume.geometry)


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


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    data = path.read_bytes()
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            # One byte over the cap (and header) shows a decompression bomb without inflating all of it.
            raw = stream.read(max_bytes + 2**20)
            if stream.read(1):
                raise DataError(
                    "the file inflates to more than its header claims or the cap allows",
                    path=path,
                    remedy="Correct the file, or raise data.max_gib.",
                    code="too_large",
                )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"the gzip stream is damaged ({_first_line(error)})", path=path, remedy=_COPY_AGAIN, code="truncated"
        ) from error
    return raw


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
