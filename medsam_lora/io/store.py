"""The prepared store: one folder per case with two memory-mapped arrays and an index.

::

    <fingerprint>/<case_id>/image.npy   (N, M, X, Y) int16 or float32, raw voxels
                            label.npy   (N, X, Y) uint8, canonical; absent without a reference
                            index.json  geometry, statistics, sha256 of the arrays and of the source files
    <fingerprint>/plan.json crop.json prepare.csv failures.csv

A case is written under a temporary name and renamed, so it is whole or absent. ``.npy`` maps fastest and needs no
library; as it notices no flipped byte, the index holds sha256 digests.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from medsam_lora.errors import PreparedError
from medsam_lora.geometry import Geometry
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.tables import read_table
from medsam_lora.records import PreparedSlices

PREPARE_COLUMNS: Final = (
    "case_id",
    "split",
    "status",
    "n_slices",
    "x",
    "y",
    "brain_voxels",
    "brain_voxels_lost",
    "tumour_voxels",
    "tumour_voxels_lost",
    "duration_s",
)
"""Columns of ``prepare.csv``; `status` is done, skipped or failed."""

IMAGE_FILE, LABEL_FILE, INDEX_FILE, TABLE_FILE = "image.npy", "label.npy", "index.json", "prepare.csv"

_REMEDY = "Prepare the case again: delete its folder and run medsam-lora prepare."


def write_case(folder: Path, slices: PreparedSlices, index_extra: Mapping[str, Any]) -> None:
    """Write a case, whole or not at all; an older one in its place is replaced.

    Parameters
    ----------
    folder : Path
        ``<fingerprint>/<case_id>``.
    slices : PreparedSlices
    index_extra : mapping
        Plain data for the index beside that of the slices: the digest of the source files, for instance.
    """
    # A leading dot is no case id, so what a killed process leaves behind is never taken for a case.
    partial = _beside(folder)
    partial.mkdir(parents=True)
    try:
        arrays = {IMAGE_FILE: slices.image} | ({} if slices.label is None else {LABEL_FILE: slices.label})
        digests = {name: _save(partial / name, array) for name, array in arrays.items()}
        index = {**_index_of(slices), "arrays": digests, **index_extra}
        write_bytes_atomically(partial / INDEX_FILE, _json_bytes(index))
        _swap(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a case.

    Raises
    ------
    PreparedError
        Where there is none, or it is no index.
    """
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PreparedError("the case is not prepared", path=folder, remedy="Run medsam-lora prepare.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PreparedError("the index is damaged", path=path, remedy=_REMEDY) from error
    if not isinstance(index, dict) or "case_id" not in index or "arrays" not in index:
        raise PreparedError("the index is damaged", path=path, remedy=_REMEDY)
    return index


def update_index(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of a case's index, atomically, the arrays untouched."""
    write_bytes_atomically(folder / INDEX_FILE, _json_bytes(read_index(folder) | dict(changes)))


def open_case(folder: Path, *, check_hash: bool = False) -> PreparedSlices:
    """Open a case; its arrays are read-only memory maps.

    Parameters
    ----------
    folder : Path
        ``<fingerprint>/<case_id>``.
    check_hash : bool
        Also read the arrays whole and compare their sha256 with the index.

    Raises
    ------
    PreparedError
        Where the case is not there, an array is missing, truncated, of another shape, or (if asked) has changed.
    """
    index = read_index(folder)
    try:
        image = _map(folder, IMAGE_FILE, index, check_hash)
        label = _map(folder, LABEL_FILE, index, check_hash) if LABEL_FILE in index["arrays"] else None
        return PreparedSlices(
            index["case_id"],
            index["patient_id"],
            index["split"],
            tuple(index["modalities"]),
            image,
            label,
            tuple(index["ks"]),
            np.array(index["mean"], np.float64).reshape(image.shape[:2]),
            np.array(index["std"], np.float64).reshape(image.shape[:2]),
            index["voxels"],
            Geometry.from_json(index["native"]),
            Geometry.from_json(index["crop"]),
            index["report"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PreparedError("the index is damaged", path=folder / INDEX_FILE, remedy=_REMEDY) from error


def open_store(
    folder: Path, case_ids: Sequence[str] | None = None, *, check_hash: bool = False
) -> list[PreparedSlices]:
    """Open the cases of a store.

    Parameters
    ----------
    folder : Path
        ``<fingerprint>``.
    case_ids : sequence of str, optional
        The cases wanted; by default those that the last run of prepare lists as done. Folders are not searched: what
        an earlier manifest left there is no part of this one.
    check_hash : bool
        As in `open_case`.

    Raises
    ------
    PreparedError
        As `open_case`, and where the store has no ``prepare.csv``.
    """
    if case_ids is None:
        rows = read_table(folder / TABLE_FILE, ("case_id", "status"), PreparedError)
        case_ids = [row["case_id"] for row in rows if row["status"] in ("done", "skipped")]
    return [open_case(folder / case_id, check_hash=check_hash) for case_id in case_ids]


def _index_of(slices: PreparedSlices) -> dict[str, Any]:
    return {
        "case_id": slices.case_id,
        "patient_id": slices.patient_id,
        "split": slices.split,
        "modalities": list(slices.modalities),
        "ks": [int(k) for k in slices.ks],
        "mean": slices.mean.tolist(),
        "std": slices.std.tolist(),
        "voxels": slices.voxels,
        "native": slices.native.to_json(),
        "crop": slices.crop.to_json(),
        "report": dict(slices.report),
    }


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    # np.save's own bytes, hashed on their way: reading a full volume back would take as long as writing it.
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as handle:
        for part in (header.getvalue(), np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):
            digest.update(part)
            size += handle.write(part)
    return {"sha256": digest.hexdigest(), "bytes": size, "shape": list(array.shape), "dtype": str(array.dtype)}


def _map(folder: Path, name: str, index: Mapping[str, Any], check_hash: bool) -> np.ndarray:
    path, noted = folder / name, index["arrays"][name]
    case_id = index["case_id"]
    if not path.is_file():
        raise PreparedError("the array is missing", case_id=case_id, path=path, remedy=_REMEDY)
    size = path.stat().st_size
    if size != noted["bytes"]:
        raise PreparedError(
            f"the array has {size} bytes, the index notes {noted['bytes']}", case_id=case_id, path=path, remedy=_REMEDY
        )
    if check_hash and sha256_of(path) != noted["sha256"]:
        raise PreparedError("the array has changed since it was written", case_id=case_id, path=path, remedy=_REMEDY)
    try:
        # A memory map of nothing is an error in numpy; a case without slices is none.
        array = np.load(path, mmap_mode=None if 0 in noted["shape"] else "r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise PreparedError("not a readable array", case_id=case_id, path=path, remedy=_REMEDY) from error
    if list(array.shape) != noted["shape"] or str(array.dtype) != noted["dtype"]:
        raise PreparedError(
            f"the array is {array.dtype} {array.shape}, the index notes {noted['dtype']} {tuple(noted['shape'])}",
            case_id=case_id,
            path=path,
            remedy=_REMEDY,
        )
    return array


def _swap(partial: Path, folder: Path) -> None:
    """Put the new folder in the place of the old; at any moment the case is the old one, absent, or the new one."""
    if not folder.exists():
        partial.replace(folder)
        return
    # A folder that is not empty cannot be replaced in one step.
    old = _beside(folder)
    folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    # A line per entry: laid out further, the statistics of a full volume would take longer to write than its voxels.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
