"""The voxels of a NIfTI file whose header is judged already: all of them, or the first planes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.io.inflate import GzipStream, InflateError, OverBudget

HEADER_ERRORS = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
    OSError,
    ValueError,
    OverflowError,
)
"""What nibabel raises on a damaged header."""

# What may follow the voxels before a file counts as a decompression bomb.
_SLACK_BYTES = 2**20

_COPY_AGAIN = "Copy the file again from its source."

Allocate = Callable[[int], np.ndarray]
"""A number of bytes to an uninitialised array of uint8, shape (bytes,)."""


def _empty(n_bytes: int) -> np.ndarray:
    return np.empty(n_bytes, np.uint8)


def claimed_bytes(image: nib.Nifti1Image) -> int:
    """Bytes up to the end of the voxels, by the header."""
    # Python integers: the product of a forged header overflows int64.
    claimed = int(np.dtype(image.get_data_dtype()).itemsize)
    for n in image.shape:
        claimed *= max(int(n), 0)
    return claimed + _proxy(image).offset


def _proxy(image: nib.Nifti1Image) -> nib.arrayproxy.ArrayProxy:
    assert isinstance(image.dataobj, nib.arrayproxy.ArrayProxy)  # an image read from a file has no other
    return image.dataobj


def is_scaled(image: nib.Nifti1Image) -> bool:
    """Whether voxels are stored with a slope or an intercept."""
    return (_proxy(image).slope, _proxy(image).inter) != (1.0, 0.0)


def leading_planes(path: Path, image: nib.Nifti1Image, data: bytes, count: int) -> np.ndarray:
    """The first planes along the last axis, from the beginning of a file, whose end is neither read nor checked.

    Parameters
    ----------
    path : Path
        For the message.
    image : nibabel.Nifti1Image
        Judged by `examine_header`, and not `is_scaled`.
    data : bytes
        The file's.
    count : int
        Planes wanted.

    Returns
    -------
    ndarray, shape (X, Y, count)
        Of the type that the file has.

    Raises
    ------
    DataError
        With the codes ``truncated`` and ``unreadable``.
    """
    shape, dtype, offset = image.shape[:3], image.get_data_dtype(), _proxy(image).offset
    wanted = offset + count * shape[0] * shape[1] * dtype.itemsize
    raw = np.frombuffer(data, np.uint8, min(wanted, len(data)))
    if path.name.lower().endswith(".gz"):
        raw = np.empty(wanted, np.uint8)
        try:
            raw = raw[: GzipStream(data).read_into(raw.data)]
        except (EOFError, InflateError) as error:
            raise _damaged(path, error) from error
    if len(raw) < wanted:
        raise truncated(path, f"the voxels end early ({len(raw)} of {wanted} bytes)")
    return raw[offset:].view(dtype).reshape((*shape[:2], count), order="F")


def read_voxels(path: Path, image: nib.Nifti1Image, allocate: Allocate = _empty) -> tuple[np.ndarray, list[DataError]]:
    """The voxels as stored, or as float32 where they are scaled, and what follows them in the file."""
    expected = claimed_bytes(image)
    raw, junk = _contents(path, expected, allocate)
    if len(raw) < expected:
        raise truncated(path, f"the voxels end early ({len(raw)} of {expected} bytes)")
    if is_scaled(image):
        try:
            # Scaling to float32 halves the peak of nibabel's default, float64.
            with nib.imageglobals.LoggingOutputSuppressor(), np.errstate(over="ignore", invalid="ignore"):
                array = np.asarray(nib.Nifti1Image.from_bytes(raw.tobytes()).dataobj, np.float32)
        except (*HEADER_ERRORS, EOFError) as error:
            raise truncated(path, f"the voxels end early ({first_line(error)})") from error
    else:
        # What was inflated is the array: no second copy.
        array = raw[_proxy(image).offset :].view(image.get_data_dtype()).reshape(image.shape, order="F")
    message = f"{junk} bytes follow the voxels"
    remedy = "Harmless in itself; compare the file with its source."
    faults = [DataError(message, path=path, remedy=remedy, code="trailing_junk")] if junk else []
    return array.reshape(array.shape[:3]), faults


def as_image(array: np.ndarray) -> np.ndarray:
    """Voxels as the package holds them: int16 where integers fit, else float32."""
    if array.dtype.kind in "iu" and fits_int16(array):
        return np.asarray(array, np.int16)
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def fits_int16(array: np.ndarray) -> bool:
    """Whether every value of an array of integers, or of rounded floats, is one of int16."""
    limits = np.iinfo(np.int16)
    if np.can_cast(array.dtype, np.int16):
        return True
    return bool(array.min() >= limits.min and array.max() <= limits.max)


def _contents(path: Path, expected: int, allocate: Allocate) -> tuple[np.ndarray, int]:
    """The bytes of a file, inflated, up to `expected`, and how many follow them; some slack is read to find out."""
    budget = expected + _SLACK_BYTES
    try:
        if not path.name.lower().endswith(".gz"):
            raw = np.fromfile(path, np.uint8, expected)
            return raw, max(path.stat().st_size - expected, 0)
        if path.stat().st_size > budget + budget // 8:
            raise OverBudget("even compressed")  # deflate never adds an eighth
        stream = GzipStream(path.read_bytes())
        raw = allocate(expected)
        filled = stream.read_into(raw.data)
        extra = stream.finish(_SLACK_BYTES)
        return raw[:filled], extra + stream.junk
    except OverBudget as error:
        message = f"the file inflates to more than {gib(budget)}, its header claims {gib(expected)}"
        remedy = "Do not trust the file; copy it again from its source."
        raise DataError(message, path=path, remedy=remedy, code="too_large") from error
    except (EOFError, OSError, InflateError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, EOFError):
        return truncated(path, f"the gzip stream is cut ({first_line(error)})")
    return unreadable(path, f"the gzip stream is damaged ({first_line(error)})")


def unreadable(path: Path, message: str, remedy: str = _COPY_AGAIN) -> DataError:
    """The error for a file that is not what it should be."""
    return DataError(message, path=path, remedy=remedy, code="unreadable")


def truncated(path: Path, message: str) -> DataError:
    """The error for a file that ends early."""
    return DataError(message, path=path, remedy=_COPY_AGAIN, code="truncated")


def gib(n: int) -> str:
    """A number of bytes for a reader, in GiB or MiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**28 else f"{n / 2**20:.1f} MiB"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0]
