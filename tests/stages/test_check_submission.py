"""The submission rules of BraTS 2023, each broken alone."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.nifti import write_label_map
from medsam_lora.stages.check_submission import QFORM, SHAPE, check_submission

GRID = Geometry(SHAPE, np.array(QFORM, float))
GOOD = "BraTS-MEN-00004-000.nii.gz"
TUMOUR = np.zeros(SHAPE, np.uint8)
TUMOUR[100:104, 90:94, 60:64] = np.arange(64).reshape(4, 4, 4) % 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that the challenge accepts."""
    place = tmp_path / "submission"
    place.mkdir()
    write_label_map(place / GOOD, TUMOUR, GRID)
    return place


def codes(folder: Path, **options: object) -> list[tuple[str, str]]:
    findings = check_submission(folder, **options)
    assert all(f.severity == "error" and f.detail and f.remedy for f in findings)
    return [(f.file, f.code) for f in findings]


def test_what_this_program_writes_is_accepted(folder: Path):
    assert codes(folder) == []
    assert codes(folder, cases=["BraTS-MEN-00004-000"]) == []


def test_other_files_and_folders_are_named(folder: Path):
    (folder / "record.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "BraTS-MEN-00005-000.nii").write_bytes(b"")
    (folder / "a-00006-000.nii.gz").symlink_to(folder / "gone")
    assert check_submission(folder)[1].detail == "a link to nothing; every file must be one"
    (folder / "a-00006-000.nii.gz").unlink()
    assert codes(folder) == [
        ("BraTS-MEN-00005-000.nii", "not_nii_gz"), ("more", "not_nii_gz"), ("record.json", "not_nii_gz")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["00004.nii.gz", "BraTS-MEN-0004-000.nii.gz", "00004-00.nii.gz", "00004-000-seg.nii.gz", "pred_1.nii.gz"]
)
def test_names_end_in_patient_and_time_point(folder: Path, name: str):
    (folder / GOOD).rename(folder / name)
    assert codes(folder) == [(name, "wrong_name")]


@pytest.mark.parametrize("name", ["00004-000.nii.gz", "BraTS-GLI-00004-000.nii.gz", "x00004-000.nii.gz"])
def test_any_prefix_will_do(folder: Path, name: str):
    (folder / GOOD).rename(folder / name)
    assert codes(folder) == []


def test_ids_are_unique_known_and_complete(folder: Path):
    (folder / "again-00004-000.nii.gz").write_bytes((folder / GOOD).read_bytes())
    assert codes(folder) == [("again-00004-000.nii.gz", "duplicate_case")]
    (folder / "again-00004-000.nii.gz").unlink()
    found = check_submission(folder, ["BraTS-MEN-00004-001", "BraTS-MEN-00004-000"])
    assert [(f.case_id, f.code) for f in found] == [("00004-001", "missing_case")]
    assert codes(folder, cases=["BraTS-MEN-00009-000"]) == [(GOOD, "unknown_case"), ("", "missing_case")]


def test_the_shape_is_that_of_the_atlas(folder: Path):
    write_label_map(folder / GOOD, TUMOUR[:, :, :154], Geometry((240, 240, 154), GRID.affine))
    (finding,) = check_submission(folder)
    assert finding.code == "wrong_shape"
    assert "(240, 240, 154)" in finding.detail and "(240, 240, 155)" in finding.detail


def test_the_qform_counts_and_not_the_sform(folder: Path):
    image = nib.Nifti1Image(TUMOUR, GRID.affine)
    image.set_qform(np.eye(4), 0)
    image.to_filename(folder / GOOD)
    assert np.array_equal(nib.load(folder / GOOD).affine, GRID.affine)
    (finding,) = check_submission(folder)
    assert finding.code == "wrong_qform" and "(code 0)" in finding.detail
    # The code is not looked at, only the matrix.
    image.set_qform(GRID.affine, 0)
    image.to_filename(folder / GOOD)
    assert codes(folder) == []
    moved = GRID.affine.copy()
    moved[1, 3] = 0
    write_label_map(folder / GOOD, TUMOUR, Geometry(SHAPE, moved))
    assert codes(folder) == [(GOOD, "wrong_qform")]


def test_labels_are_those_of_2023(folder: Path):
    write_label_map(folder / GOOD, np.where(TUMOUR == 3, 4, TUMOUR), GRID)
    (finding,) = check_submission(folder)
    assert finding.code == "unexpected_label"
    assert "4 (16 voxels)" in finding.detail and "4" in finding.remedy
    image = nib.Nifti1Image((TUMOUR * 0.3).astype(np.float32), GRID.affine)
    image.set_qform(GRID.affine, 1)
    image.to_filename(folder / GOOD)
    assert codes(folder) == [(GOOD, "not_integer_labels")]


def test_every_rule_of_a_file_in_one_go(folder: Path):
    write_label_map(folder / GOOD, np.full((5, 4, 3), 7), Geometry((5, 4, 3), np.eye(4)))
    (folder / GOOD).rename(folder / "pred.nii.gz")
    assert codes(folder) == [
        ("pred.nii.gz", code) for code in ("wrong_name", "wrong_shape", "wrong_qform", "unexpected_label")
    ]


def test_files_that_cannot_be_read(folder: Path):
    data = (folder / GOOD).read_bytes()
    (folder / GOOD).write_bytes(data[:-20])
    (folder / "00005-000.nii.gz").write_bytes(b"no gzip")
    (folder / "00006-000.nii.gz").write_bytes(gzip.compress(b"no NIfTI"))
    found = dict(codes(folder))
    assert set(found) == {GOOD, "00005-000.nii.gz", "00006-000.nii.gz"}
    assert found[GOOD] == "truncated"


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        check_submission(tmp_path / "nowhere")
    with pytest.raises(DataError, match="empty"):
        check_submission(tmp_path)


def test_the_stage_imports_without_torch():
    code = "import sys, medsam_lora.stages.check_submission; print(sorted({'torch', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
