"""Building a manifest once and again, and its way through a datalist."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from nifti_cases import SUFFIXES_2018, write_case

from medsam_lora.errors import ManifestError
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.splits import splits_of_patients
from medsam_lora.stages.manifest import build_manifest, export_datalist, import_datalist
from medsam_lora.stages.verify import verify


def add(root: Path, *names: str) -> None:
    """Files that only their names matter of."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / f"{name}-t1c.nii.gz").write_bytes(name.encode())


def ids(*numbers: int) -> list[str]:
    return [f"BraTS-MEN-{n:05}-{t:03}" for n in numbers for t in range(2)]


def test_build_writes_what_it_returns_sorted_and_split_by_patient(tmp_path: Path) -> None:
    add(tmp_path / "data", *ids(*range(19, -1, -1)))
    records = build_manifest(tmp_path / "data", tmp_path / "out" / "M.csv", {}, 0)
    assert read_manifest(tmp_path / "out" / "M.csv") == records
    assert [r.case_id for r in records] == ids(*range(20))
    found = splits_of_patients(records)
    assert len(found) == 20
    assert all(len(splits) == 1 for splits in found.values())
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [28, 6, 6]
    assert records[0].files == {"t1c": "BraTS-MEN-00000-000-t1c.nii.gz"}


def test_build_is_the_same_again_and_another_seed_deals_otherwise(tmp_path: Path) -> None:
    add(tmp_path / "data", *ids(*range(20)))
    first = build_manifest(tmp_path / "data", tmp_path / "A.csv", {"train": 0.5}, 4)
    assert build_manifest(tmp_path / "data", tmp_path / "B.csv", {"train": 0.5}, 4) == first
    assert (tmp_path / "A.csv").read_bytes() == (tmp_path / "B.csv").read_bytes()
    assert build_manifest(tmp_path / "data", tmp_path / "C.csv", {"train": 0.5}, 5) != first


def test_splits_are_written_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "M.csv"
    add(tmp_path / "data", *ids(*range(10)))
    before = {r.case_id: r.split for r in build_manifest(tmp_path / "data", out, {}, 0)}
    add(tmp_path / "data", *ids(*range(10, 20)), "BraTS-MEN-00003-002")
    with caplog.at_level(logging.INFO):
        after = {r.case_id: r.split for r in build_manifest(tmp_path / "data", out, {"test": 0.5}, 77)}
    assert {case: after[case] for case in before} == before
    assert after["BraTS-MEN-00003-002"] == before["BraTS-MEN-00003-000"]
    assert sum(split == "test" for split in after.values()) >= 20 - 1
    assert "dealt anew: BraTS-MEN-00010, BraTS-MEN-00011" in caplog.text
    assert "BraTS-MEN-00003" not in caplog.text


def test_what_people_corrected_by_hand_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "M.csv"
    add(tmp_path / "data", *ids(0, 1))
    records = build_manifest(tmp_path / "data", out, {"train": 1}, 0)
    corrected = [replace(r, patient_id="same", split="val", label_convention="binary") for r in records]
    write_manifest(out, corrected)
    assert build_manifest(tmp_path / "data", out, {"train": 1}, 0) == corrected


def test_cases_that_are_gone_keep_their_line_and_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "data" / "M.csv"
    add(tmp_path / "data", *ids(*range(10)))
    before = build_manifest(tmp_path / "data", out, {}, 0)
    (tmp_path / "data" / "BraTS-MEN-00004-001-t1c.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        assert build_manifest(tmp_path / "data", out, {}, 0) == before
    assert "their lines are kept: BraTS-MEN-00004-001" in caplog.text
    assert ("BraTS-MEN-00004-001", "missing_file") in {(f.case_id, f.code) for f in verify(out)}


def test_changed_files_are_said_and_hashed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "M.csv"
    add(tmp_path / "data", *ids(0, 1))
    before = build_manifest(tmp_path / "data", out, {}, 0)
    (tmp_path / "data" / "BraTS-MEN-00001-000-t1c.nii.gz").write_bytes(b"other")
    with caplog.at_level(logging.WARNING):
        after = build_manifest(tmp_path / "data", out, {}, 0)
    assert "the files of case BraTS-MEN-00001-000 have changed" in caplog.text
    assert [a.case_id for a, b in zip(after, before, strict=True) if a.sha256 != b.sha256] == ["BraTS-MEN-00001-000"]


def test_nothing_is_written_where_the_request_is_senseless(tmp_path: Path) -> None:
    out = tmp_path / "M.csv"
    add(tmp_path / "data", *ids(0))
    for fractions in ({"train": 0.9, "val": 0.9}, {"train": 2.0}):
        with pytest.raises(ManifestError):
            build_manifest(tmp_path / "data", out, fractions, 0)
    with pytest.raises(ManifestError):
        build_manifest(tmp_path / "empty", out, {}, 0)
    assert not out.exists()
    out.write_text("not,a,manifest\n")
    with pytest.raises(ManifestError):
        build_manifest(tmp_path / "data", out, {}, 0)
    assert out.read_text() == "not,a,manifest\n"


def test_a_manifest_goes_through_a_datalist_and_comes_back(tmp_path: Path) -> None:
    for n in range(4):
        write_case(tmp_path, f"Brats18_CBICA_A{n}_1", suffixes=SUFFIXES_2018)
    records = build_manifest(tmp_path, tmp_path / "M.csv", {}, 0)
    assert export_datalist(tmp_path / "M.csv", tmp_path / "lists" / "list.json") == records
    assert json.loads((tmp_path / "lists" / "list.json").read_text())["labels"]["4"] == "enhancing tumor"
    assert import_datalist(tmp_path / "lists" / "list.json", tmp_path / "N.csv", tmp_path) == records
    assert (tmp_path / "N.csv").read_bytes() == (tmp_path / "M.csv").read_bytes()
    assert verify(tmp_path / "N.csv") == []


def test_the_datalists_folder_is_the_root_unless_one_is_given(tmp_path: Path) -> None:
    for n in range(3):
        write_case(tmp_path / "data", f"BraTS-MEN-{n:05}-000")
    records = build_manifest(tmp_path / "data", tmp_path / "M.csv", {}, 0)
    export_datalist(tmp_path / "M.csv", tmp_path / "data" / "list.json")
    data = json.loads((tmp_path / "data" / "list.json").read_text())
    for section in ("training", "validation", "test"):
        for item in data[section]:
            del item["sha256"]
    (tmp_path / "data" / "list.json").write_text(json.dumps(data))
    # the hashes can only come from files found beside the datalist
    assert import_datalist(tmp_path / "data" / "list.json", tmp_path / "N.csv") == records
