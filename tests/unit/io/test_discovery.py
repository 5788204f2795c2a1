"""Which files are a case, what a case is called, and what is left alone."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
from nifti_cases import SUFFIXES_2018, write_case

from medsam_lora.errors import ManifestError
from medsam_lora.io.discovery import convention_of, parse_file_name, patient_of
from medsam_lora.io.manifest import case_path, discover


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BraTS-MEN-00000-000-t1c.nii.gz", ("BraTS-MEN-00000-000", "t1c")),
        ("BraTS-GLI-01666-001-t2f.nii", ("BraTS-GLI-01666-001", "t2f")),
        ("BRATS-MET-00001-000-T1N.NII.GZ", ("BRATS-MET-00001-000", "t1n")),
        ("BraTS-SSA-00002-000-seg.nii.gz", ("BraTS-SSA-00002-000", "seg")),
        ("Brats18_TCIA01_201_1_t1ce.nii.gz", ("Brats18_TCIA01_201_1", "t1c")),
        ("Brats17_2013_2_1_t1.nii.gz", ("Brats17_2013_2_1", "t1n")),
        ("BraTS19_CBICA_AAB_1_t2.nii", ("BraTS19_CBICA_AAB_1", "t2w")),
        ("BraTS20_Training_001_flair.nii", ("BraTS20_Training_001", "t2f")),
        ("BraTS2021_00000_Seg.nii.gz", ("BraTS2021_00000", "seg")),
        # predictions, derivatives and strangers
        ("BraTS-MEN-00000-000.nii.gz", None),
        ("BraTS-MEN-00000-000.seg.nrrd", None),
        ("BraTS-MEN-00000-000-seg-pred.nii.gz", None),
        ("BraTS-MEN-00000-000-pred-seg.nii.gz", None),
        ("BraTS-MEN-00000-000-t1c-n4.nii.gz", None),
        ("BraTS2021_00000_prediction_seg.nii.gz", None),
        ("BraTS2021_00000_t1ce.nii.gz.bak", None),
        ("BraTS2021_00000_t1ce.json", None),
        ("MNI152_t1.nii.gz", None),
        ("W39_1998.09.19_Segm.nii", None),
        ("t1c.nii.gz", None),
    ],
)
def test_file_names(name: str, expected: tuple[str, str] | None) -> None:
    assert parse_file_name(name) == expected


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("BraTS-MEN-00074-001", "BraTS-MEN-00074"),
        ("brats-gli-00005-100", "brats-gli-00005"),
        ("Brats18_TCIA01_201_1", "Brats18_TCIA01_201"),
        ("Brats17_2013_2_1", "Brats17_2013_2"),
        ("BraTS19_CBICA_AAB_1", "BraTS19_CBICA_AAB"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BraTS2021_00000", "BraTS2021_00000"),
        ("ward7-12", "ward7-12"),
        ("BRATS_001", "BRATS_001"),
    ],
)
def test_patients(case_id: str, patient: str) -> None:
    assert patient_of(case_id) == patient


def test_the_convention_follows_the_year_of_the_name() -> None:
    assert convention_of("BraTS-PED-00001-000") == "brats2023"
    assert [convention_of(c) for c in ("Brats18_CBICA_ABM_1", "BraTS20_Training_001", "BraTS2021_00000")] == [
        "brats2018"
    ] * 3


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
def test_whole_cases_of_both_layouts_are_found(tmp_path: Path, nested: bool, ending: str) -> None:
    new, old = "BraTS-MEN-00004-001", "Brats18_CBICA_ABM_1"
    paths = {
        new: write_case(tmp_path, new, nested=nested, ending=ending),
        old: write_case(tmp_path, old, nested=nested, ending=ending, suffixes=SUFFIXES_2018),
    }
    records = discover(tmp_path)
    assert [r.case_id for r in records] == [new, old]
    assert [r.patient_id for r in records] == ["BraTS-MEN-00004", "Brats18_CBICA_ABM"]
    assert [r.label_convention for r in records] == ["brats2023", "brats2018"]
    assert [r.split for r in records] == ["", ""]
    for record in records:
        assert tuple(record.files) == ("t1n", "t1c", "t2f", "t2w", "seg")
        for key, path in paths[record.case_id].items():
            assert record.files[key] == path.relative_to(tmp_path).as_posix()
            assert case_path(record, key, tmp_path) == path.resolve()


def test_the_hash_is_of_the_five_digests_in_column_order(tmp_path: Path) -> None:
    # t2w and seg are missing, and the folder lists the files in another order than the columns
    touch(tmp_path, *(f"BraTS-MEN-00001-000-{s}.nii.gz" for s in ("t2f", "t1c", "t1n")))
    (record,) = discover(tmp_path)
    assert set(record.files) == {"t1n", "t1c", "t2f"}
    hexes = [hashlib.sha256(f"BraTS-MEN-00001-000-{s}.nii.gz".encode()).hexdigest() for s in ("t1n", "t1c", "t2f")]
    assert record.sha256 == hashlib.sha256("".join(hexes).encode()).hexdigest()


def test_modalities_and_references_may_be_in_folders_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "images/BraTS2021_00000_t1.nii.gz", "labels/deep/er/BraTS2021_00000_seg.nii.gz")
    (record,) = discover(tmp_path)
    assert record.files == {
        "t1n": "images/BraTS2021_00000_t1.nii.gz",
        "seg": "labels/deep/er/BraTS2021_00000_seg.nii.gz",
    }


def test_predictions_hidden_and_unrelated_files_are_left_alone(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "BraTS-MEN-00001-000/BraTS-MEN-00001-000-t1c.nii.gz",
        "BraTS-MEN-00001-000/._BraTS-MEN-00001-000-t1c.nii.gz",
        "__MACOSX/BraTS-MEN-00001-000-t1c.nii.gz",
        ".cache/BraTS-MEN-00001-000-t1c.nii.gz",
        "predictions/BraTS-MEN-00001-000.nii.gz",
        "atlas/MNI_t1.nii.gz",
        "notes.txt",
    )
    (tmp_path / "BraTS-MEN-00002-000-t1c.nii.gz").mkdir()  # a folder is no file
    (record,) = discover(tmp_path)
    assert record.files == {"t1c": "BraTS-MEN-00001-000/BraTS-MEN-00001-000-t1c.nii.gz"}


def test_a_case_found_twice_names_both_files_and_every_such_case(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a/BraTS-MEN-00001-000-t1c.nii.gz",
        "b/BraTS-MEN-00001-000-t1c.nii.gz",
        "BraTS-MEN-00002-000-seg.nii",
        "BraTS-MEN-00002-000-seg.nii.gz",
        "x/BraTS2021_00003_t1ce.nii.gz",
        "y/brats2021_00003_T1CE.nii.gz",
    )
    with pytest.raises(ManifestError) as caught:
        discover(tmp_path)
    message = caught.value.message
    assert "a/BraTS-MEN-00001-000-t1c.nii.gz and b/BraTS-MEN-00001-000-t1c.nii.gz" in message
    assert "BraTS-MEN-00002-000-seg.nii and BraTS-MEN-00002-000-seg.nii.gz" in message
    assert "x/BraTS2021_00003_t1ce.nii.gz and y/brats2021_00003_T1CE.nii.gz" in message
    assert caught.value.code == "duplicate_case"


def test_links_inside_the_root_are_followed_once_and_links_out_of_it_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    touch(outside, "BraTS-MEN-00009-000/BraTS-MEN-00009-000-t1c.nii.gz", "BraTS-MEN-00008-000-t1c.nii.gz")
    touch(root, "store/BraTS-MEN-00001-000-t1c.nii.gz")
    (root / "again").symlink_to(root / "store")
    (root / "loop").symlink_to(root)
    (root / "out").symlink_to(outside / "BraTS-MEN-00009-000")
    (root / "BraTS-MEN-00008-000-t1c.nii.gz").symlink_to(outside / "BraTS-MEN-00008-000-t1c.nii.gz")
    with caplog.at_level(logging.WARNING):
        records = discover(root)
    assert [r.case_id for r in records] == ["BraTS-MEN-00001-000"]
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 2
    assert all("link out of the data root" in message for message in warned)


def test_a_root_that_is_itself_a_link_is_fine(tmp_path: Path) -> None:
    touch(tmp_path / "real", "BraTS-MEN-00001-000-t1c.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (record,) = discover(tmp_path / "link")
    assert record.files == {"t1c": "BraTS-MEN-00001-000-t1c.nii.gz"}
    assert case_path(record, "t1c", tmp_path / "link").is_file()


def test_a_folder_without_cases_or_none_at_all_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "patient7_t1.nii.gz")
    with pytest.raises(ManifestError, match="no BraTS case"):
        discover(tmp_path)
    with pytest.raises(ManifestError, match="no such folder"):
        discover(tmp_path / "none")


def test_the_real_cases(brats_dir: Path) -> None:
    records = discover(brats_dir)
    assert len(records) == 8
    assert all(len(r.files) == 5 and r.label_convention == "brats2018" for r in records)
    assert len({r.patient_id for r in records}) == 8
    assert "Brats18_TCIA01_201" in {r.patient_id for r in records}
