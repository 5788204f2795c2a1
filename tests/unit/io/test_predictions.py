"""What a folder of predictions says of itself, with and without a run record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medsam_lora import labels
from medsam_lora.errors import DataError
from medsam_lora.io.predictions import meanings_for, predicted_cases, predicted_mask, prediction_path, read_record


def folder_with(tmp_path: Path, record: object) -> Path:
    folder = tmp_path / "predictions"
    folder.mkdir()
    (folder / "record.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return folder


def test_a_full_record(tmp_path: Path):
    folder = folder_with(
        tmp_path,
        {
            "run": "lora_r8",
            "method": "lora",
            "prompt_source": "reference_box",
            "regions": ["ET", "WT"],
            "labels": {"1": "NETC", "2": "SNFH", "3": "ET"},
            "cases": ["b", "a"],
            "device": "cpu",
        },
    )
    record = read_record(folder)
    assert (record.run, record.method, record.prompt_source) == ("lora_r8", "lora", "reference_box")
    assert record.regions == ("WT", "ET"), "in the order of labels.REGIONS"
    assert record.meanings == {1: "NETC", 2: "SNFH", 3: "ET"}
    assert record.cases == ("b", "a")


def test_without_a_record_the_folder_names_the_run(tmp_path: Path):
    folder = tmp_path / "their_method"
    folder.mkdir()
    record = read_record(folder)
    assert (record.run, record.method, record.prompt_source) == ("their_method", "their_method", "unknown")
    assert (record.regions, record.meanings, record.cases) == (None, None, None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not a usable run record"),
        ("[]", "object with keys"),
        ({"run": 3}, "run must be text"),
        ({"method": ""}, "method must be text"),
        ({"regions": ["WT", "tumour"]}, "regions must be a list"),
        ({"regions": [["WT"]]}, "regions must be a list"),
        ({"regions": "WT"}, "regions must be a list"),
        ({"regions": []}, "regions must be a list"),
        ({"labels": {"1": "oedema"}}, "labels must map"),
        ({"labels": {"1": {}}}, "labels must map"),
        ({"labels": {"one": "WT"}}, "invalid literal"),
        ({"labels": {"0": "WT"}}, "between 1 and 255"),
        ({"labels": ["WT"]}, "labels must map"),
        ({"regions": ["WT", "TC"], "labels": {"1": "WT"}}, "no label means a part of the region TC"),
        ({"cases": "a"}, "cases must be a list"),
    ],
)
def test_unusable_records_name_the_file_and_the_fault(tmp_path: Path, content: object, complaint: str):
    with pytest.raises(DataError, match=complaint) as caught:
        read_record(folder_with(tmp_path, content))
    assert caught.value.path.name == "record.json"
    assert caught.value.remedy


def test_no_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        read_record(tmp_path / "absent")


def masks(values: list[int], meanings: dict[int, frozenset[int]]) -> dict[str, list[bool]]:
    label_map = np.array(values)
    return {region: predicted_mask(label_map, region, meanings).tolist() for region in labels.REGIONS}


def test_label_map_regions(tmp_path: Path):
    meanings = {v: labels.meaning_of(name) for v, name in {1: "NETC", 2: "SNFH", 3: "ET"}.items()}
    assert masks([0, 1, 2, 3], meanings) == {
        "WT": [False, True, True, True],
        "TC": [False, True, False, True],
        "ET": [False, False, False, True],
    }


def test_nested_regions():
    meanings = {v: labels.meaning_of(name) for v, name in {1: "WT", 2: "TC", 3: "ET"}.items()}
    assert masks([0, 1, 2, 3], meanings) == {
        "WT": [False, True, True, True],
        "TC": [False, False, True, True],
        "ET": [False, False, False, True],
    }


def test_whole_tumour_alone_says_nothing_of_the_core():
    assert masks([0, 1], {1: labels.meaning_of("WT")}) == {"WT": [False, True], "TC": [False] * 2, "ET": [False] * 2}


@pytest.mark.parametrize(
    ("convention", "et", "tc"), [("brats2023", {3}, {1, 3}), ("brats2018", {4}, {1, 4}), ("msd", {3}, {2, 3})]
)
def test_without_labels_the_convention_decides(tmp_path: Path, convention: str, et: set[int], tc: set[int]):
    meanings = meanings_for(read_record(tmp_path), convention)
    values = np.array(sorted(meanings))
    assert set(values[predicted_mask(values, "ET", meanings)].tolist()) == et
    assert set(values[predicted_mask(values, "TC", meanings)].tolist()) == tc
    assert predicted_mask(values, "WT", meanings).all()


def test_files_are_found_by_exact_case_id(tmp_path: Path):
    for name in ("a-1.nii.gz", "a-10.nii.gz", "b.nii", "c.nii", "c.nii.gz", "a-1.seg.nrrd", "record.txt"):
        (tmp_path / name).write_bytes(b"")
    assert prediction_path(tmp_path, "a-1").name == "a-1.nii.gz"
    assert prediction_path(tmp_path, "a") is None
    assert prediction_path(tmp_path, "b").name == "b.nii"
    assert prediction_path(tmp_path, "c").name == "c.nii.gz"
    assert sorted(predicted_cases(tmp_path)) == ["a-1", "a-10", "b", "c"]
