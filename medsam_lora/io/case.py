"""Reading one case whole: its modalities and its reference on one grid, or an error that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.io.checks import NonFinite, check_case
from medsam_lora.io.examine import MAX_BYTES
from medsam_lora.labels import MODALITIES
from medsam_lora.records import CaseRecord, CaseVolumes, Finding


def read_case(
    record: CaseRecord,
    root: Path,
    modalities: Sequence[str] = MODALITIES,
    *,
    max_bytes: int = MAX_BYTES,
    nonfinite: NonFinite = "reject",
    allow_missing: bool = False,
) -> CaseVolumes:
    """Read a case on its native grid.

    Parameters
    ----------
    record : CaseRecord
    root : Path
        Data root.
    modalities : sequence of str
        Channels wanted; they are given in the canonical order.
    max_bytes : int
        Cap on the bytes a header may claim.
    nonfinite : {"reject", "zero"}
        Whether NaN and infinite voxels are an error or become 0.
    allow_missing : bool
        Leave modalities out that the manifest does not list, rather than refusing the case.

    Returns
    -------
    CaseVolumes
        `image` lies in memory as the files do, the first axis of a volume fastest; it is int16 where every modality is,
        else float32. `label_map` is canonical, and None where the manifest lists no reference.

    Raises
    ------
    ValueError
        Where `modalities` is empty or names what is not a modality.
    DataError
        For whatever `verify` calls an error in a case, with case id, file, code and remedy, and for a modality that
        is not there. Faults between cases (``duplicate_file``, ``patient_in_two_splits``) and ``hash_mismatch`` are
        for `verify` alone.
    """
    wanted = [key for key in MODALITIES if key in modalities]
    if not wanted or len(wanted) != len(modalities):
        raise ValueError(f"modalities must be some of {MODALITIES}, each once, not {tuple(modalities)}")
    block = _Block(len(wanted))
    check = check_case(record, root, wanted, max_bytes=max_bytes, nonfinite=nonfinite, allocate=block)
    present = [key for key in wanted if record.files.get(key)]
    for found in check.findings:
        missing = found.code == "missing_modality" and not (allow_missing and present)
        if found.severity == "error" or missing:
            raise _error(found, root)
    volumes = [check.volumes[key] for key in present]
    image = block.stacked([volume.array for volume in volumes])
    reference = check.volumes.get("seg")
    label_map = None if reference is None else reference.array
    return CaseVolumes(record, tuple(present), image, label_map, volumes[0].geometry)


class _Block:
    """Memory that the images of a case are inflated into side by side, so that stacking them copies nothing.

    Parameters
    ----------
    count : int
        Images.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.used = 0
        self.memory = np.empty(0, np.uint8)
        self.slot = 0

    def __call__(self, n_bytes: int) -> np.ndarray:
        """Memory for the next file; of its own where it is not of the first one's size."""
        if not self.slot:
            # Voxels begin 352 bytes into a file; slots of whole cache lines keep them aligned.
            self.slot = -(-n_bytes // 64) * 64
            self.memory = np.empty(self.count * self.slot, np.uint8)
        if self.used == self.count or not self.slot - 64 < n_bytes <= self.slot:
            return np.empty(n_bytes, np.uint8)
        self.used += 1
        return self.memory[(self.used - 1) * self.slot :][:n_bytes]

    def stacked(self, volumes: Sequence[np.ndarray]) -> np.ndarray:
        """The volumes (X, Y, Z) as one array (M, X, Y, Z): a view where they lie in the block one after the other."""
        first = volumes[0]
        offset = first.ctypes.data - self.memory.ctypes.data
        places = [offset + n * self.slot for n in range(len(volumes))]
        if first.dtype == np.int16 and all(
            volume.dtype == first.dtype
            and (volume.shape, volume.strides) == (first.shape, first.strides)
            and volume.ctypes.data - self.memory.ctypes.data == place
            and 0 <= place <= self.memory.nbytes - volume.nbytes
            for volume, place in zip(volumes, places, strict=True)
        ):
            shape, strides = (len(volumes), *first.shape), (self.slot, *first.strides)
            return np.ndarray(shape, first.dtype, self.memory.data, offset, strides)
        dtype = np.int16 if all(volume.dtype == np.int16 for volume in volumes) else np.float32
        # Copied channel by channel: np.stack of mixed types would go through float64. In the order that the files have,
        # as copying into another order takes longer than inflating.
        x, y, z = first.shape
        image = np.empty((len(volumes), z, y, x), dtype).transpose(0, 3, 2, 1)
        for channel, volume in zip(image, volumes, strict=True):
            channel[...] = volume
        return image


def _error(found: Finding, root: Path) -> DataError:
    path = root / found.file if found.file else None
    return DataError(found.detail, case_id=found.case_id, path=path, remedy=found.remedy, code=found.code)
