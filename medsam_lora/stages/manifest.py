"""The stage ``manifest``: from a folder of cases to a table of them, and to and from MSD datalists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from medsam_lora.io.datalist import read_datalist, write_datalist
from medsam_lora.io.manifest import assign_splits, discover, read_manifest, write_manifest
from medsam_lora.records import CaseRecord

_log = logging.getLogger(__name__)


def build_manifest(root: Path, out: Path, fractions: Mapping[str, float], seed: int = 0) -> list[CaseRecord]:
    """Find the cases under a folder, deal their patients to splits, and write the manifest.

    Splits are written once: where `out` is there already, its patients keep their split and only new ones are dealt;
    its patient ids and label conventions are kept as well, as people correct them by hand.

    Parameters
    ----------
    root : Path
        Data root; the manifest's paths are relative to it.
    out : Path
        The manifest.
    fractions : mapping of str to float
        Shares of the patients in ``train``, ``val`` and ``test``; what is not given shares the rest.
    seed : int

    Returns
    -------
    list of CaseRecord
        As written, sorted by case id.

    Raises
    ------
    ManifestError
        Where the fractions are unusable, no case is found, one is found twice, or `out` is not a manifest.
    """
    known = {record.case_id: record for record in read_manifest(out)} if out.exists() else {}
    found = discover(root)
    merged = [_merged(record, known.get(record.case_id), out) for record in found]
    gone = sorted(set(known) - {record.case_id for record in found})
    if gone:
        # Dropping them would lose their splits, and deal them anew once they are back.
        _log.warning("%s: not found under %s, their lines are kept: %s", out, root, ", ".join(gone))
        merged += [known[case_id] for case_id in gone]
    records = assign_splits(sorted(merged, key=lambda record: record.case_id), fractions, seed)
    if known:
        new = sorted({record.patient_id for record in records} - {record.patient_id for record in known.values()})
        _log.info("%s: patients known already keep their splits; dealt anew: %s", out, ", ".join(new) or "none")
    write_manifest(out, records)
    return records


def export_datalist(manifest: Path, out: Path) -> list[CaseRecord]:
    """Write a manifest as an MSD (decathlon) datalist, labels by name.

    Parameters
    ----------
    manifest, out : Path
        The paths in the datalist are those of the manifest: put it into the data root, or give MONAI that folder as
        ``base_dir``.

    Returns
    -------
    list of CaseRecord
        The cases written.

    Raises
    ------
    ManifestError
        Where a datalist cannot hold the manifest: a modality or split missing, or several label conventions.
    """
    records = read_manifest(manifest)
    write_datalist(out, records, name=manifest.stem)
    return records


def import_datalist(datalist: Path, out: Path, root: Path | None = None) -> list[CaseRecord]:
    """Read an MSD (decathlon) datalist into a manifest, labels by name.

    Parameters
    ----------
    datalist, out : Path
    root : Path, optional
        Data root that the datalist's paths are relative to; by default the datalist's folder, as in MONAI.

    Returns
    -------
    list of CaseRecord
        As written, sorted by case id; the splits are those of the datalist.

    Raises
    ------
    ManifestError
        Where the datalist is unusable, or a path of it leads out of the data root.
    """
    records = read_datalist(datalist, datalist.parent if root is None else root)
    write_manifest(out, records)
    return records


def _merged(found: CaseRecord, old: CaseRecord | None, out: Path) -> CaseRecord:
    """The files as found, with what the manifest already says of the case."""
    if old is None:
        return found
    if old.sha256 and old.sha256 != found.sha256:
        _log.warning("%s: the files of case %s have changed since it was written", out, found.case_id)
    return replace(found, patient_id=old.patient_id, split=old.split, label_convention=old.label_convention)
