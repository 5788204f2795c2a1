"""The manifest: one CSV line per case, with its patient, split, files and hash.

Reading checks the table whole and names every bad line; finding cases (`discover`) and dealing splits
(`assign_splits`, `folds`) are in `discovery` and `splits`, and given here as well.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from medsam_lora.errors import ManifestError
from medsam_lora.io.discovery import FILE_KEYS, case_sha256, discover, patient_of
from medsam_lora.io.findings import finding
from medsam_lora.io.splits import SPLITS, assign_splits, folds, splits_of_patients
from medsam_lora.io.tables import MANIFEST_COLUMNS, write_table
from medsam_lora.labels import CONVENTIONS
from medsam_lora.records import CaseRecord, Finding

__all__ = [
    "FILE_KEYS",
    "SPLITS",
    "assign_splits",
    "case_findings",
    "case_path",
    "case_sha256",
    "discover",
    "folds",
    "parse_manifest",
    "patient_of",
    "read_manifest",
    "table_findings",
    "write_manifest",
]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Windows cannot create files of these names, whatever their suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_ID_REMEDY = "Use letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128."


def read_manifest(path: Path) -> list[CaseRecord]:
    """Read a manifest and check it whole.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of CaseRecord
        In the order of the file.

    Raises
    ------
    ManifestError
        Where the file is not a manifest, or a line of it is unusable; all bad lines are named.
    """
    numbered = parse_manifest(path)
    records = [record for _, record in numbered]
    faults = [(str(line), fault) for line, record in numbered for fault in case_findings(record)]
    for fault in table_findings(records):
        lines = [str(line) for line, record in numbered if record.case_id.lower() == fault.case_id.lower()]
        faults.append((" and ".join(lines), fault))
    if faults:
        listed = "; ".join(f"line {lines}: {fault.detail}" for lines, fault in faults)
        raise ManifestError(listed, path=path, remedy=faults[0][1].remedy, code=faults[0][1].code)
    return records


def parse_manifest(path: Path) -> list[tuple[int, CaseRecord]]:
    """Read the lines of a manifest without judging what they say.

    Returns
    -------
    list of (int, CaseRecord)
        Line number (the header is line 1) and record.

    Raises
    ------
    ManifestError
        Where the file is missing, not a UTF-8 CSV, lacks a column or has no cases, or lines have too few or too many
        cells; all such lines are named.
    """
    rows = _rows(path)
    header = rows[0][1] if rows else []
    absent = [name for name in MANIFEST_COLUMNS if name not in header]
    doubled = sorted({name for name in header if header.count(name) > 1})
    if absent or doubled:
        message = f"lacks the column {', '.join(absent)}" if absent else f"has the column {', '.join(doubled)} twice"
        raise ManifestError(
            f"the table {message}", path=path, remedy=f"Its columns must be {','.join(MANIFEST_COLUMNS)}."
        )
    bad = [f"line {line} has {len(cells)} cells" for line, cells in rows[1:] if len(cells) != len(header)]
    if bad:
        raise ManifestError(
            f"{'; '.join(bad)}; the header has {len(header)}", path=path, remedy="Correct the lines named."
        )
    if len(rows) == 1:
        raise ManifestError("the table has no cases", path=path, remedy="Make it with medsam-lora manifest build.")
    return [(line, _record(dict(zip(header, cells, strict=True)))) for line, cells in rows[1:]]


def write_manifest(path: Path, records: Sequence[CaseRecord]) -> None:
    """Write a manifest, atomically, in the order given.

    Raises
    ------
    ManifestError
        Where a record could not be read back; nothing is written then.
    """
    faults = [f for record in records for f in case_findings(record)] + table_findings(records)
    if faults:
        raise ManifestError(
            "; ".join(dict.fromkeys(f.detail for f in faults)), path=path, remedy=faults[0].remedy, code=faults[0].code
        )
    write_table(path, MANIFEST_COLUMNS, [_row(record) for record in records])


def case_path(record: CaseRecord, key: str, root: Path) -> Path:
    """Where a file of a case is.

    Parameters
    ----------
    record : CaseRecord
    key : str
        A modality or ``seg``.
    root : Path
        Data root.

    Returns
    -------
    Path
        Absolute, links resolved; it need not exist.

    Raises
    ------
    ManifestError
        Where the record lists no such file (``missing_modality`` or ``missing_reference``), or it is not inside the
        data root once links are resolved (``path_outside_root``).
    """
    text = record.files.get(key, "")
    if not text:
        raise ManifestError(
            f"the manifest lists no {key}",
            case_id=record.case_id,
            remedy=f"Fill the column {key}.",
            code="missing_reference" if key == "seg" else "missing_modality",
        )
    base = root.resolve()
    path = None if _leaves_root(text) else (base / text).resolve()
    if path is None or not path.is_relative_to(base):
        raise ManifestError(
            f"the path in the column {key} leads out of the data root {base}",
            case_id=record.case_id,
            path=text,
            remedy="Write a path relative to the data root, with '/', and no link out of it.",
            code="path_outside_root",
        )
    return path


def case_findings(record: CaseRecord) -> list[Finding]:
    """What is wrong with a line of a manifest, without looking at its files."""
    name = record.case_id
    found = []
    if not _ID.fullmatch(name) or _RESERVED.fullmatch(name):
        found.append(finding("bad_case_id", name, f"the case id {name!r} cannot name a file", _ID_REMEDY))
    if not _ID.fullmatch(record.patient_id):
        detail = f"case {name!r} has the patient id {record.patient_id!r}"
        found.append(finding("bad_patient_id", name, detail, _ID_REMEDY))
    if record.split not in ("", *SPLITS):
        detail = f"case {name!r} has the split {record.split!r}"
        found.append(finding("unknown_split", name, detail, f"Use {', '.join(SPLITS)}, or leave the cell empty."))
    if record.label_convention not in CONVENTIONS:
        detail = f"case {name!r} has the label convention {record.label_convention!r}"
        found.append(finding("unknown_convention", name, detail, f"Use one of {', '.join(CONVENTIONS)}."))
    if record.sha256 and not _SHA256.fullmatch(record.sha256):
        detail = f"case {name!r} has a sha256 that is not 64 hexadecimal digits"
        found.append(finding("bad_sha256", name, detail, "Build the manifest again, or leave the cell empty."))
    for key in FILE_KEYS:
        text = record.files.get(key, "")
        if text and _leaves_root(text):
            detail = f"case {name!r} has a path in the column {key} that leads out of the data root: {text!r}"
            remedy = "Write a path relative to the data root, with '/' and without '..'."
            found.append(finding("path_outside_root", name, detail, remedy, file=text))
    return found


def table_findings(records: Sequence[CaseRecord]) -> list[Finding]:
    """What is wrong between the lines of a manifest: cases named twice, patients in two splits."""
    spelt: dict[str, list[str]] = {}
    for record in records:
        # Results are files named by case; many file systems do not tell upper from lower case.
        spelt.setdefault(record.case_id.lower(), []).append(record.case_id)
    found = [
        finding(
            "duplicate_case",
            names[0],
            f"{len(names)} lines have the case id {' and '.join(sorted(set(names)))}",
            "Keep one of them, or give them ids that differ in more than upper and lower case.",
        )
        for names in spelt.values()
        if len(names) > 1
    ]
    for patient, splits in splits_of_patients(records).items():
        if len(splits) > 1:
            where = ", ".join(f"{split}: {' '.join(cases)}" for split, cases in splits.items())
            found += [
                finding(
                    "patient_in_two_splits",
                    case,
                    f"patient {patient} is in two splits ({where})",
                    "Put all cases of a patient into one split.",
                )
                for cases in splits.values()
                for case in cases
            ]
    return found


def _leaves_root(text: str) -> bool:
    posix, windows = PurePosixPath(text), PureWindowsPath(text)
    return bool(posix.is_absolute() or windows.anchor or "\\" in text or "\0" in text or ".." in posix.parts)


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    if not path.is_file():
        raise ManifestError("no such file", path=path, remedy="Check the path.")
    try:
        reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        # Blank lines, which editors leave at the end, are no cases.
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ManifestError(f"not a CSV table ({problem})", path=path, remedy="Save it as UTF-8 CSV.") from problem


def _record(row: dict[str, str]) -> CaseRecord:
    cells = {key: value.strip() for key, value in row.items()}
    return CaseRecord(
        cells["case_id"],
        cells["patient_id"],
        cells["split"],
        {key: cells[key] for key in FILE_KEYS if cells[key]},
        cells["label_convention"],
        cells["sha256"],
    )


def _row(record: CaseRecord) -> dict[str, str]:
    return {
        "case_id": record.case_id,
        "patient_id": record.patient_id,
        "split": record.split,
        **{key: record.files.get(key, "") for key in FILE_KEYS},
        "label_convention": record.label_convention,
        "sha256": record.sha256,
    }
