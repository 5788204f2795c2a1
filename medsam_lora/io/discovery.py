"""Finding BraTS cases in a folder by the names of their files.

Two grammars are known: BraTS 2023 (``BraTS-MEN-00000-000-t1c.nii.gz``) and BraTS 2012-2021
(``Brats18_TCIA01_201_1_t1ce.nii.gz``, ``BraTS2021_00000_flair.nii.gz``), in any upper or lower case, ``.nii`` or
``.nii.gz``, in folders nested in any way or in none. Whatever does not match one of them to the letter - predictions,
atlases, other people's masks - is left alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from medsam_lora.errors import ManifestError
from medsam_lora.io.files import sha256_of
from medsam_lora.labels import MODALITIES, MODALITY_ALIASES
from medsam_lora.records import CaseRecord

FILE_KEYS = (*MODALITIES, "seg")
"""The files of a case, in the order of the manifest's columns."""

_SUFFIXES = {**MODALITY_ALIASES, "seg": "seg"}
_BRATS_2023 = re.compile(r"(?P<patient>brats-[a-z0-9]+-[0-9]+)-[0-9]+", re.IGNORECASE)
_BRATS_2012_2021 = re.compile(r"brats(?:20)?(?P<year>[12][0-9])(?:_[a-z0-9]+)*_[0-9]+", re.IGNORECASE)
_FILE_NAME = re.compile(r"(?P<case>.+)[-_](?P<suffix>[a-z0-9]+)\.nii(\.gz)?", re.IGNORECASE)
# Of these years the last number of an id counts the patient's sessions; later ids are their own patients.
_YEARS_WITH_SESSIONS = {"17", "18", "19"}

_log = logging.getLogger(__name__)


def parse_file_name(name: str) -> tuple[str, str] | None:
    """Case id and key (modality or ``seg``) of a BraTS file name, or None for any other name.

    Examples
    --------
    >>> parse_file_name("BraTS-MEN-00004-000-t1c.nii.gz"), parse_file_name("Brats18_CBICA_ABM_1_FLAIR.nii")
    (('BraTS-MEN-00004-000', 't1c'), ('Brats18_CBICA_ABM_1', 't2f'))
    >>> parse_file_name("BraTS-MEN-00004-000.nii.gz"), parse_file_name("BraTS-MEN-00004-000-pred-seg.nii.gz")
    (None, None)
    """
    match = _FILE_NAME.fullmatch(name)
    if match is None or match["suffix"].lower() not in _SUFFIXES:
        return None
    case_id = match["case"]
    if not (_BRATS_2023.fullmatch(case_id) or _BRATS_2012_2021.fullmatch(case_id)):
        return None
    return case_id, _SUFFIXES[match["suffix"].lower()]


def patient_of(case_id: str) -> str:
    """The patient of a case, from the case id.

    Patients of BraTS 2023 repeat over time points (the last three digits), those of 2017 to 2019 over sessions; any
    other id is its own patient.

    Examples
    --------
    >>> patient_of("BraTS-MEN-00074-001"), patient_of("Brats18_TCIA01_201_1")
    ('BraTS-MEN-00074', 'Brats18_TCIA01_201')
    >>> patient_of("BraTS20_Training_001"), patient_of("BraTS2021_00000"), patient_of("ward7-12")
    ('BraTS20_Training_001', 'BraTS2021_00000', 'ward7-12')
    """
    match = _BRATS_2023.fullmatch(case_id)
    if match:
        return match["patient"]
    match = _BRATS_2012_2021.fullmatch(case_id)
    if match and match["year"] in _YEARS_WITH_SESSIONS:
        return case_id.rpartition("_")[0]
    return case_id


def convention_of(case_id: str) -> str:
    """The label convention that a BraTS case id stands for: ``brats2023``, or ``brats2018`` for 2012 to 2021."""
    return "brats2023" if _BRATS_2023.fullmatch(case_id) else "brats2018"


def discover(root: Path) -> list[CaseRecord]:
    """Find the BraTS cases under a folder.

    Parameters
    ----------
    root : Path
        Searched to any depth; links that lead out of it are not followed, and hidden files and folders are skipped.

    Returns
    -------
    list of CaseRecord
        Sorted by case id, without splits, with the hash of their files. A modality or reference that is not there is
        not in `files`.

    Raises
    ------
    ManifestError
        Where there is no case, or a file of a case is there twice (all of these are named).
    """
    if not root.is_dir():
        raise ManifestError("no such folder", path=root, remedy="Give the folder that holds the cases.")
    root = root.resolve()
    names: dict[str, str] = {}
    found: dict[str, dict[str, list[str]]] = {}
    for path in _files(root):
        parsed = parse_file_name(path.name)
        if parsed is None:
            continue
        case_id, key = parsed
        # One case may be spelt in two ways where people have renamed files by hand.
        identity = case_id.lower()
        names.setdefault(identity, case_id)
        found.setdefault(identity, {}).setdefault(key, []).append(path.relative_to(root).as_posix())
    if not found:
        raise ManifestError(
            "no BraTS case found here (such as BraTS-MEN-00000-000-t1c.nii.gz or BraTS2021_00000_t1ce.nii.gz)",
            path=root,
            remedy="Give the folder that holds the cases; for other names write the manifest by hand or import one.",
        )
    twice = [
        f"{names[identity]}: {' and '.join(paths)}"
        for identity, keys in sorted(found.items())
        for paths in keys.values()
        if len(paths) > 1
    ]
    if twice:
        raise ManifestError(
            f"the same file of a case is there twice: {'; '.join(twice)}",
            path=root,
            remedy="Remove one of each, or give a folder that holds only one.",
            code="duplicate_case",
        )
    records = []
    for identity, keys in sorted(found.items(), key=lambda item: names[item[0]]):
        case_id = names[identity]
        files = {key: keys[key][0] for key in FILE_KEYS if key in keys}
        digests = {key: sha256_of(root / path) for key, path in files.items()}
        records.append(
            CaseRecord(case_id, patient_of(case_id), "", files, convention_of(case_id), case_sha256(digests))
        )
    return records


def case_sha256(digests: dict[str, str]) -> str:
    """The hash of a case: SHA-256 of its files' hex digests, concatenated in column order, a missing one empty.

    Parameters
    ----------
    digests : dict of str to str
        Modality or ``seg`` to hex digest.

    Examples
    --------
    >>> import hashlib
    >>> case_sha256({"seg": "bb", "t1n": "aa"}) == hashlib.sha256(b"aabb").hexdigest()
    True
    """
    return hashlib.sha256("".join(digests.get(key, "") for key in FILE_KEYS).encode("ascii")).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """Files under `root` in an order of their own names, not of the file system."""
    seen = {root}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = Path(folder)
        descend = []
        for name in sorted(subfolders):
            if name.startswith(".") or name == "__MACOSX":
                continue
            target = (here / name).resolve()
            if not target.is_relative_to(root):
                _log.warning("%s is a link out of the data root and is not followed", here / name)
            elif target not in seen:  # a link may lead back to a folder above it
                seen.add(target)
                descend.append(name)
        subfolders[:] = descend
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or not path.is_file():
                continue
            if path.resolve().is_relative_to(root):
                yield path
            elif parse_file_name(name):
                _log.warning("%s is a link out of the data root and is not read", path)
