"""Exchange of manifests with the datalist JSON of the Medical Segmentation Decathlon, as MONAI reads it.

Channels and labels are understood by their names, never by their numbers: MSD's Task01 calls oedema 1 and the
non-enhancing core 2, BraTS the other way round. Beside the keys of MSD every case carries ``case_id``,
``patient_id`` and ``sha256``, which MONAI passes through, so that export and import are inverse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from medsam_lora.errors import ManifestError
from medsam_lora.io.discovery import FILE_KEYS, case_sha256, parse_file_name, patient_of
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.manifest import case_findings, case_path, table_findings
from medsam_lora.labels import CONVENTIONS, ET, MODALITIES, MODALITY_ALIASES, NETC, SNFH
from medsam_lora.records import CaseRecord

SECTIONS: Final[Mapping[str, str]] = {"train": "training", "val": "validation", "test": "test"}
"""For every split, the key of a datalist that lists its cases."""

_TUMOUR = -1  # any tumour: the one label of a binary reference

# Whole names, lower case without punctuation; no part of a name is ever matched ("enhancing" is in "non-enhancing").
_MEANINGS: Final[Mapping[str, int]] = {
    "background": 0,
    "netc": NETC,
    "ncr": NETC,
    "ncr net": NETC,
    "necrosis": NETC,
    "necrotic core": NETC,
    "necrotic tumor core": NETC,
    "non enhancing tumor": NETC,
    "non enhancing tumor core": NETC,
    "necrotic and non enhancing tumor": NETC,
    "necrotic and non enhancing tumor core": NETC,
    "snfh": SNFH,
    "ed": SNFH,
    "edema": SNFH,
    "peritumoral edema": SNFH,
    "surrounding non enhancing flair hyperintensity": SNFH,
    "et": ET,
    "enhancing tumor": ET,
    "gd enhancing tumor": ET,
    "tumor": _TUMOUR,
    "whole tumor": _TUMOUR,
    "wt": _TUMOUR,
}
_LABEL_NAMES = {0: "background", NETC: "non-enhancing tumor", SNFH: "edema", ET: "enhancing tumor"}
_CHANNEL_NAMES = {"t1n": "T1w", "t1c": "T1gd", "t2f": "FLAIR", "t2w": "T2w"}
_CHANNELS = {**MODALITY_ALIASES, "t1w": "t1n"}


def write_datalist(path: Path, records: Sequence[CaseRecord], name: str = "medsam-lora") -> None:
    """Write a datalist, atomically.

    Parameters
    ----------
    path : Path
    records : sequence of CaseRecord
        Every one with a split, all four modalities and the same label convention.
    name : str
        Of the data set.

    Raises
    ------
    ManifestError
        Where a datalist cannot say what the records say; all such cases are named.
    """
    conventions = sorted({record.label_convention for record in records})
    if len(conventions) != 1:
        raise ManifestError(
            f"a datalist has one list of labels, the cases have {len(conventions)} ({', '.join(conventions)})",
            remedy="Export the cases of each label convention by themselves.",
        )
    unfit = [record.case_id for record in records if not record.split or set(MODALITIES) - set(record.files)]
    if unfit:
        raise ManifestError(
            f"cases without a split or with a modality missing: {', '.join(unfit)}",
            remedy="Complete them, or take them out of the manifest to export.",
        )
    data: dict[str, Any] = {
        "name": name,
        "description": "Image files per case in the order of 'modality'; paths are relative to the data root.",
        "tensorImageSize": "4D",
        "modality": {str(i): _CHANNEL_NAMES[key] for i, key in enumerate(MODALITIES)},
        "labels": _labels_of(conventions[0]),
        "numTraining": sum(record.split == "train" for record in records),
        "numTest": sum(record.split == "test" for record in records),
    }
    for split, section in SECTIONS.items():
        data[section] = [_item(record) for record in records if record.split == split]
    write_bytes_atomically(path, (json.dumps(data, indent=2) + "\n").encode())


def read_datalist(path: Path, root: Path) -> list[CaseRecord]:
    """Read a datalist whose cases list one image file per modality.

    Parameters
    ----------
    path : Path
    root : Path
        What the datalist's paths are relative to (MONAI's ``base_dir``).

    Returns
    -------
    list of CaseRecord
        Sorted by case id; the hash is the datalist's where it has one, else that of the files where they are there.

    Raises
    ------
    ManifestError
        Where the file is not such a datalist, names a channel or a label that is not known, or points out of the
        root; all faults of its cases are named.
    """
    data = _load(path)
    try:
        channels = _channels(data.get("modality"))
        convention = _convention(data.get("labels"))
    except ManifestError as error:
        raise ManifestError(error.message, path=path, remedy=error.remedy) from error
    records: list[CaseRecord] = []
    faults: list[str] = []
    for split, section in SECTIONS.items():
        for number, item in enumerate(data.get(section) or []):
            try:
                records.append(_record(item, channels, convention, split))
            except ManifestError as error:
                faults.append(f"{section}[{number}]: {error.message}")
    faults += [f.detail for record in records for f in case_findings(record)]
    faults += [f.detail for f in table_findings(records)]
    if faults or not records:
        raise ManifestError(
            "; ".join(dict.fromkeys(faults)) or "it lists no cases",
            path=path,
            remedy=f"Every case needs an image of {len(channels)} files, one per modality, under the data root.",
        )
    return sorted((_hashed(record, root) for record in records), key=lambda record: record.case_id)


def _item(record: CaseRecord) -> dict[str, Any]:
    item: dict[str, Any] = {"image": [record.files[key] for key in MODALITIES]}
    if "seg" in record.files:
        item["label"] = record.files["seg"]
    return item | {"case_id": record.case_id, "patient_id": record.patient_id, "sha256": record.sha256}


def _labels_of(convention: str) -> dict[str, str]:
    if convention == "binary":
        return {"0": "background", "1": "whole tumor"}
    return {"0": "background"} | {str(v): _LABEL_NAMES[label] for v, label in CONVENTIONS[convention].items()}


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ManifestError("no such file", path=path, remedy="Check the path.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:  # JSON and UTF-8 errors alike
        raise ManifestError(f"not a JSON file ({problem})", path=path, remedy="Give a datalist JSON.") from problem
    sections = [key for key in SECTIONS.values() if isinstance(data, dict) and isinstance(data.get(key), list)]
    if not sections:
        raise ManifestError(
            "not a datalist: it has none of the lists training, validation, test", path=path, remedy="Give one."
        )
    return data


def _numbered(value: Any, what: str) -> list[tuple[int, str]]:
    """Entries of ``{"0": "FLAIR", ...}``, or of a list, by number."""
    if isinstance(value, list):
        value = {str(i): name for i, name in enumerate(value)}
    if not isinstance(value, dict) or not all(str(k).isdigit() and isinstance(v, str) for k, v in value.items()):
        raise ManifestError(f"{what!r} does not map numbers to names", remedy='Write {"0": "FLAIR", ...}.')
    return sorted((int(key), name) for key, name in value.items())


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower().replace("tumour", "tumor").replace("oedema", "edema")))


def _channels(value: Any) -> list[str]:
    numbered = _numbered(value, "modality")
    unknown = [name for _, name in numbered if _plain(name) not in _CHANNELS]
    channels = [_CHANNELS[_plain(name)] for _, name in numbered if _plain(name) in _CHANNELS]
    if unknown or len(set(channels)) != len(channels):
        raise ManifestError(
            f"cannot tell the modalities from the names {', '.join(name for _, name in numbered)}",
            remedy=f"Name each of them once, such as {', '.join(_CHANNEL_NAMES.values())}.",
        )
    return channels


def _convention(value: Any) -> str:
    numbered = _numbered(value, "labels")
    meanings = {number: _MEANINGS.get(_plain(name)) for number, name in numbered}
    tumour = {number: meaning for number, meaning in meanings.items() if meaning != 0}
    if tumour == {1: _TUMOUR}:
        return "binary"
    for convention, labels in CONVENTIONS.items():
        if convention != "binary" and tumour == labels:
            return convention
    raise ManifestError(
        f"the labels {', '.join(f'{number}: {name}' for number, name in numbered)} are none of the known conventions",
        remedy=f"Known are {', '.join(f'{name} {_labels_of(name)}' for name in CONVENTIONS)}.",
    )


def _record(item: Any, channels: Sequence[str], convention: str, split: str) -> CaseRecord:
    image = item.get("image") if isinstance(item, dict) else None
    if not isinstance(image, list) or len(image) != len(channels) or not all(isinstance(f, str) for f in image):
        raise ManifestError(f"its image is not a list of {len(channels)} files")
    label = item.get("label")
    if label is not None and not isinstance(label, str):
        raise ManifestError("its label is not one file")
    listed = dict(zip(channels, image, strict=True)) | ({"seg": label} if label else {})
    files = {key: listed[key].removeprefix("./") for key in FILE_KEYS if listed.get(key)}
    case_id = str(item.get("case_id") or _case_id_of(label or image[0]))
    patient_id = str(item.get("patient_id") or patient_of(case_id))
    return CaseRecord(case_id, patient_id, split, files, convention, str(item.get("sha256") or ""))


def _case_id_of(file: str) -> str:
    """The case a file is named after: a BraTS name, else the name without a modality or channel 0 at its end."""
    name = re.split(r"[/\\]", file)[-1]
    parsed = parse_file_name(name)
    if parsed is not None:
        return parsed[0]
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    ending = "|".join([*_CHANNELS, "seg", "label", "0000"])
    return re.sub(rf"[-_](?:{ending})$", "", stem, flags=re.IGNORECASE)


def _hashed(record: CaseRecord, root: Path) -> CaseRecord:
    paths = {key: case_path(record, key, root) for key in record.files}
    if record.sha256 or not all(path.is_file() for path in paths.values()):
        return record
    digests = {key: sha256_of(path) for key, path in paths.items()}
    return replace(record, sha256=case_sha256(digests))
