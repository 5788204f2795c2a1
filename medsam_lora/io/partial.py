"""Reading only as much of a case's images as its chosen planes need, where `verify` has read and hashed them whole.

A reader that stops at a plane never sees the checksum at the end of a gzip stream. So the whole file, compressed, is
hashed instead: where its SHA-256 is the one that `verify` noted after it had read the file to its end without finding a
fault, it is that file bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsam_lora.errors import MedsamLoraError
from medsam_lora.geometry import Geometry
from medsam_lora.io.examine import MAX_BYTES, examine, examine_header, open_header
from medsam_lora.io.manifest import case_path
from medsam_lora.io.tables import VERIFIED_COLUMNS, read_table, write_table
from medsam_lora.io.voxels import is_scaled, leading_planes
from medsam_lora.labels import MODALITIES, to_canonical
from medsam_lora.records import CaseRecord, CaseVolumes

VERIFIED_FILE = "verified.csv"
"""Name of the table that `verify` writes beside its findings."""

ChoosePlanes = Callable[[np.ndarray, Geometry], Sequence[int] | None]
"""(canonical label map, its geometry) to the planes wanted along array axis 2, or None where all are needed."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifiedFile:
    """A file without a fault.

    Parameters
    ----------
    sha256 : str
        Hex digest of its bytes.
    dtype : str
        ``int16`` or ``float32``: how `read_case` holds the whole volume.
    """

    sha256: str
    dtype: str


Verified = Mapping[tuple[str, str], VerifiedFile]
"""(case id, file as in the manifest) to what is known of it."""


def read_verified(path: Path) -> dict[tuple[str, str], VerifiedFile]:
    """What `verify` noted; nothing where there is no such table."""
    if not path.is_file():
        return {}
    rows = read_table(path, VERIFIED_COLUMNS)
    return {(row["case_id"], row["file"]): VerifiedFile(row["sha256"], row["dtype"]) for row in rows}


def write_verified(path: Path, files: Iterable[tuple[str, str, VerifiedFile]]) -> None:
    """Write the table of files without a fault: case id, file, and what is known of it."""
    rows = [{"case_id": case_id, "file": file, **vars(known)} for case_id, file, known in files]
    write_table(path, VERIFIED_COLUMNS, rows)


def read_planes(
    record: CaseRecord,
    root: Path,
    modalities: Sequence[str],
    verified: Verified,
    choose: ChoosePlanes,
    *,
    max_bytes: int = MAX_BYTES,
) -> CaseVolumes | None:
    """Read a case's reference whole, and of its images the planes chosen by it.

    Parameters
    ----------
    record : CaseRecord
    root : Path
        Data root.
    modalities : sequence of str
        Channels wanted.
    verified : mapping
        From `read_verified`.
    choose : callable
        See `ChoosePlanes`.
    max_bytes : int
        Cap on the bytes a header may claim.

    Returns
    -------
    CaseVolumes or None
        With `planes`. None where the case must be read whole: a file is not verified or no longer the one that was, the
        planes cannot be chosen by the reference alone, or anything is amiss, which reading it whole will name.
    """
    wanted = [key for key in MODALITIES if key in modalities]
    files = [record.files.get(key, "") for key in (*wanted, "seg")]
    if not all((record.case_id, file) in verified for file in files):
        return None
    try:
        reading = examine(case_path(record, "seg", root), max_bytes, label_map=True)
        if reading.faults or reading.array is None or reading.geometry is None:
            return None
        label_map = to_canonical(reading.array, record.label_convention, contiguous=False)
        planes = choose(label_map, reading.geometry)
        if planes is None or not len(planes):
            return None
        channels = [_planes_of(record, root, key, verified, reading.geometry, planes, max_bytes) for key in wanted]
    except (MedsamLoraError, OSError) as error:
        _log.debug("case %s: read whole (%s)", record.case_id, error)
        return None
    found = [channel for channel in channels if channel is not None]
    if len(found) < len(channels):
        return None
    dtype = np.int16 if all(channel.dtype == np.int16 for channel in found) else np.float32
    image = np.stack([channel.astype(dtype, copy=False) for channel in found])
    return CaseVolumes(record, tuple(wanted), image, label_map, reading.geometry, tuple(planes))


def _planes_of(
    record: CaseRecord,
    root: Path,
    key: str,
    verified: Verified,
    geometry: Geometry,
    planes: Sequence[int],
    max_bytes: int,
) -> np.ndarray | None:
    """Some planes of a modality, shape (X, Y, planes), or None where the file must be read whole."""
    path, known = case_path(record, key, root), verified[record.case_id, record.files[key]]
    image = open_header(path)
    faults, own = examine_header(path, image, max_bytes)
    if faults or own is None or not own.matches(geometry) or is_scaled(image):
        return None
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != known.sha256:
        _log.info("case %s: %s has changed since it was verified, so it is read whole", record.case_id, path.name)
        return None
    taken = leading_planes(path, image, data, max(planes) + 1)[..., list(planes)].astype(known.dtype)
    if taken.dtype.kind == "f" and not np.isfinite(taken).all():
        return None
    return taken
