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
        `image` is int16 where every modality is, else float32; `label_map` is canonical, and None where the manifest
        lists no reference.

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
    check = check_case(record, root, wanted, max_bytes=max_bytes, nonfinite=nonfinite)
    present = [key for key in wanted if record.files.get(key)]
    for found in check.findings:
        missing = found.code == "missing_modality" and not (allow_missing and present)
        if found.severity == "error" or missing:
            raise _error(found, root)
    volumes = [check.volumes[key] for key in present]
    dtype = np.int16 if all(volume.array.dtype == np.int16 for volume in volumes) else np.float32
    # Copied channel by channel: np.stack of mixed types would go through float64.
    image = np.empty((len(volumes), *volumes[0].geometry.shape), dtype)
    for channel, volume in zip(image, volumes, strict=True):
        channel[...] = volume.array
    reference = check.volumes.get("seg")
    label_map = None if reference is None else reference.array
    return CaseVolumes(record, tuple(present), image, label_map, volumes[0].geometry)


def _error(found: Finding, root: Path) -> DataError:
    path = root / found.file if found.file else None
    return DataError(found.detail, case_id=found.case_id, path=path, remedy=found.remedy, code=found.code)
