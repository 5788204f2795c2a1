"""MSD datalists: names decide, numbers never; what is exported is imported, and MONAI reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medsam_lora.errors import ManifestError
from medsam_lora.io.datalist import read_datalist, write_datalist
from medsam_lora.io.manifest import assign_splits, discover
from medsam_lora.labels import CONVENTIONS
from medsam_lora.records import CaseRecord

MSD_TASK01 = {
    "name": "BRATS",
    "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
    "training": [
        {
            "image": [f"./imagesTr/BRATS_001_000{i}.nii.gz" for i in range(4)],
            "label": "./labelsTr/BRATS_001.nii.gz",
            "fold": 0,
        }
    ],
    "test": [{"image": [f"./imagesTs/BRATS_485_000{i}.nii.gz" for i in range(4)]}],
}


def record(case_id: str, split: str, convention: str = "brats2023", seg: bool = True) -> CaseRecord:
    files = {key: f"{case_id}/{key}.nii.gz" for key in ("t1n", "t1c", "t2f", "t2w")}
    if seg:
        files["seg"] = f"{case_id}/seg.nii.gz"
    return CaseRecord(case_id, f"patient-{case_id}", split, files, convention, "0f" * 32)


def saved(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(MSD_TASK01 | changes))
    return path


def test_msd_task01_is_understood_by_name(tmp_path: Path) -> None:
    first, second = read_datalist(saved(tmp_path), tmp_path)
    assert first.case_id == first.patient_id == "BRATS_001"
    assert first.split == "train"
    # channel 0 is FLAIR, and so on: into our order
    assert first.files == {
        "t1n": "imagesTr/BRATS_001_0001.nii.gz",
        "t1c": "imagesTr/BRATS_001_0002.nii.gz",
        "t2f": "imagesTr/BRATS_001_0000.nii.gz",
        "t2w": "imagesTr/BRATS_001_0003.nii.gz",
        "seg": "labelsTr/BRATS_001.nii.gz",
    }
    assert list(first.files) == ["t1n", "t1c", "t2f", "t2w", "seg"]
    assert first.label_convention == "msd"
    assert first.sha256 == ""  # the files are not there to be hashed
    assert (second.case_id, second.split, "seg" in second.files) == ("BRATS_485", "test", False)


@pytest.mark.parametrize(
    ("labels", "convention"),
    [
        ({"0": "background", "1": "NETC", "2": "SNFH", "3": "ET"}, "brats2023"),
        ({"3": "Enhancing Tumor", "2": "Oedema", "1": "NCR/NET", "0": "Background"}, "brats2023"),
        ({"0": "background", "1": "necrotic and non-enhancing tumor core", "2": "ED", "4": "ET"}, "brats2018"),
        ({"0": "background", "1": "peritumoral_edema", "2": "non-enhancing tumour", "3": "GD-enhancing tumor"}, "msd"),
        ({"0": "background", "1": "whole tumour"}, "binary"),
        (["background", "tumor"], "binary"),
    ],
)
def test_the_convention_is_what_the_names_say(tmp_path: Path, labels: object, convention: str) -> None:
    assert read_datalist(saved(tmp_path, labels=labels), tmp_path)[0].label_convention == convention


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"0": "background", "1": "ET", "2": "edema", "3": "NETC"}}, "none of the known conventions"),
        ({"labels": {"0": "background", "1": "edema", "2": "not enhancing"}}, "none of the known conventions"),
        ({"labels": {"background": 0, "tumor": 1}}, "does not map numbers to names"),
        ({"labels": None}, "does not map numbers to names"),
        ({"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "PET"}}, "cannot tell the modalities"),
        ({"modality": {"0": "FLAIR", "1": "T1w", "2": "T1", "3": "T2"}}, "cannot tell the modalities"),
        ({"modality": "MRI"}, "does not map numbers to names"),
        ({"training": [{"image": "imagesTr/BRATS_001.nii.gz"}]}, r"training\[0\]: its image is not a list of 4"),
        ({"training": [{"image": ["a.nii", "b.nii"]}, "x"]}, r"training\[0\].*training\[1\]"),
        ({"training": [{"image": ["a", "b", "c", "d"], "label": ["e"]}]}, "label is not one file"),
        ({"training": [], "test": []}, "no cases"),
        ({"training": None, "test": None}, "none of the lists"),
        ({"test": [{"image": ["../a.nii", "b.nii", "c.nii", "d.nii"]}]}, "column t2f that leads out"),
        ({"test": [{"image": ["/a.nii", "b.nii", "c.nii", "d.nii"]}]}, "column t2f that leads out"),
        ({"test": [{"image": list("abcd"), "case_id": "../x"}]}, "cannot name a file"),
        ({"test": MSD_TASK01["training"]}, "2 lines have the case id BRATS_001"),
    ],
)
def test_what_cannot_be_understood_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ManifestError, match=words) as caught:
        read_datalist(saved(tmp_path, **changes), tmp_path)
    assert caught.value.path == tmp_path / "list.json"
    assert caught.value.remedy


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "imagesTr").symlink_to(tmp_path)
    with pytest.raises(ManifestError) as caught:
        read_datalist(saved(tmp_path), tmp_path / "root")
    assert caught.value.code == "path_outside_root"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"training": {}}'])
def test_what_is_no_datalist_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError):
        read_datalist(path, tmp_path)
    with pytest.raises(ManifestError, match="no such file"):
        read_datalist(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("image", "label", "case_id"),
    [
        ("x/BraTS-MEN-00001-000-t1n.nii.gz", None, "BraTS-MEN-00001-000"),
        ("x/ward7_t1.nii", None, "ward7"),
        ("x/ward7_0000.nii.gz", None, "ward7"),
        ("x/ward7_0001.nii.gz", None, "ward7_0001"),  # channel 0 is 0000; this is a name
        ("x/ward7_0000.nii.gz", "y/ward_0012.nii.gz", "ward_0012"),
        ("x/a.nii", "y/ward7_seg.nii.gz", "ward7"),
    ],
)
def test_cases_without_an_id_are_called_after_their_files(
    tmp_path: Path, image: str, label: str | None, case_id: str
) -> None:
    item = {"image": [image, "b.nii", "c.nii", "d.nii"]} | ({"label": label} if label else {})
    (found,) = read_datalist(saved(tmp_path, training=[item], test=[]), tmp_path)
    assert found.case_id == case_id


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_export_and_import_are_inverse(tmp_path: Path, convention: str) -> None:
    records = [
        record("a", "train", convention),
        record("b", "val", convention),
        record("c", "test", convention, seg=False),
        record("d", "train", convention),
    ]
    write_datalist(tmp_path / "list.json", records, name="mine")
    assert read_datalist(tmp_path / "list.json", tmp_path) == records


def test_the_datalist_says_what_msd_says(tmp_path: Path) -> None:
    write_datalist(tmp_path / "list.json", [record("a", "train"), record("b", "test")], name="mine")
    data = json.loads((tmp_path / "list.json").read_text())
    assert data["name"] == "mine"
    assert data["modality"] == {"0": "T1w", "1": "T1gd", "2": "FLAIR", "3": "T2w"}
    assert data["labels"] == {"0": "background", "1": "non-enhancing tumor", "2": "edema", "3": "enhancing tumor"}
    assert (data["numTraining"], data["numTest"], data["validation"]) == (1, 1, [])
    assert data["training"] == [
        {
            "image": ["a/t1n.nii.gz", "a/t1c.nii.gz", "a/t2f.nii.gz", "a/t2w.nii.gz"],
            "label": "a/seg.nii.gz",
            "case_id": "a",
            "patient_id": "patient-a",
            "sha256": "0f" * 32,
        }
    ]


def test_what_a_datalist_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    sparse = replace(record("b", "train"), files={"t1c": "b.nii"})
    for records, words in (
        ([record("a", "train"), record("b", "train", "msd")], "brats2023, msd"),
        ([record("a", "train"), sparse, record("c", "")], "missing: b, c"),
    ):
        with pytest.raises(ManifestError, match=words):
            write_datalist(tmp_path / "list.json", records)
    assert not (tmp_path / "list.json").exists()


def test_monai_reads_the_export(tmp_path: Path) -> None:
    from monai.data import load_decathlon_datalist

    write_datalist(tmp_path / "list.json", [record("a", "train"), record("b", "train"), record("c", "val")])
    items = load_decathlon_datalist(tmp_path / "list.json", data_list_key="training", base_dir=tmp_path)
    assert [item["case_id"] for item in items] == ["a", "b"]
    assert items[1]["image"] == [str(tmp_path / "b" / f"{key}.nii.gz") for key in ("t1n", "t1c", "t2f", "t2w")]
    assert items[1]["label"] == str(tmp_path / "b" / "seg.nii.gz")


def test_the_hash_is_made_where_the_files_are_there(tmp_path: Path) -> None:
    case_id = "BraTS-MEN-00001-000"
    for suffix in ("t1n", "t1c", "t2f", "t2w", "seg"):
        (tmp_path / f"{case_id}-{suffix}.nii.gz").write_bytes(suffix.encode())
    records = assign_splits(discover(tmp_path), {"train": 1}, 0)
    write_datalist(tmp_path / "list.json", records)
    data = json.loads((tmp_path / "list.json").read_text())
    del data["training"][0]["sha256"]
    (tmp_path / "list.json").write_text(json.dumps(data))
    assert read_datalist(tmp_path / "list.json", tmp_path) == records
