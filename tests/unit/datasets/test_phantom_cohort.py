"""Cohorts on disk: BraTS names, exact contents, nothing made twice, damage repaired."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.datasets.phantom import RECORD, make_case, make_cohort
from medsam_lora.io.nifti import read_label_map, read_volume
from medsam_lora.labels import MODALITIES

TINY = (24, 28, 16)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    assert make_cohort(tmp_path, 3, 5, TINY) == ["BraTS-PHT-00000-000", "BraTS-PHT-00001-000", "BraTS-PHT-00001-001"]
    return tmp_path


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*.nii.gz"))
    }


def test_files_hold_the_case(cohort: Path) -> None:
    expected = make_case(5, 2, TINY)
    folder = cohort / "BraTS-PHT-00001-001"
    names = [f"BraTS-PHT-00001-001-{name}.nii.gz" for name in (*MODALITIES, "seg")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name, image in zip(names, expected.images, strict=False):
        volume = read_volume(folder / name)
        assert volume.array.dtype == np.int16
        assert np.array_equal(volume.array, image)
        assert volume.geometry.matches(expected.geometry)
    assert np.array_equal(read_label_map(folder / names[-1]).array, expected.label_map)


def test_headers_are_as_the_brats_validator_wants_them(cohort: Path) -> None:
    for path in cohort.rglob("*.nii.gz"):
        image = nib.Nifti1Image.from_filename(path)
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert np.isnan(image.header["scl_slope"]) or float(image.header["scl_slope"]) == 1
        assert image.get_data_dtype() == (np.uint8 if path.name.endswith("-seg.nii.gz") else np.int16)


def test_a_second_run_does_nothing(cohort: Path) -> None:
    before = state(cohort)
    make_cohort(cohort, 3, 5, TINY)
    assert state(cohort) == before


def test_a_longer_cohort_keeps_the_cases_there_are(cohort: Path) -> None:
    before = state(cohort)
    assert len(make_cohort(cohort, 4, 5, TINY)) == 4
    after = state(cohort)
    assert len(after) == 20
    assert {name: after[name] for name in before} == before


def test_damaged_and_missing_files_are_made_again(cohort: Path) -> None:
    before = {name: data for name, (_, data) in state(cohort).items()}
    first, second = cohort / "BraTS-PHT-00000-000", cohort / "BraTS-PHT-00001-000"
    (first / "BraTS-PHT-00000-000-t1c.nii.gz").write_bytes(gzip.compress(b"not what it was"))
    (second / "BraTS-PHT-00001-000-seg.nii.gz").unlink()
    untouched = (cohort / "BraTS-PHT-00001-001" / "BraTS-PHT-00001-001-seg.nii.gz").stat().st_mtime_ns
    make_cohort(cohort, 3, 5, TINY)
    after = state(cohort)
    assert {name: data for name, (_, data) in after.items()} == before
    assert after["BraTS-PHT-00001-001/BraTS-PHT-00001-001-seg.nii.gz"][0] == untouched


@pytest.mark.parametrize("record", ["{", '{"recipe": -1, "cases": {}}', "[]"])
def test_a_record_of_another_recipe_or_none_is_not_believed(cohort: Path, record: str) -> None:
    before = {name: data for name, (_, data) in state(cohort).items()}
    victim = cohort / "BraTS-PHT-00000-000" / "BraTS-PHT-00000-000-t1n.nii.gz"
    victim.write_bytes(b"")
    (cohort / RECORD).write_text(record)
    make_cohort(cohort, 3, 5, TINY)
    assert {name: data for name, (_, data) in state(cohort).items()} == before


def test_the_folder_holds_one_cohort_and_no_mixture(cohort: Path) -> None:
    before = {name: data for name, (_, data) in state(cohort).items()}
    notes = cohort / "BraTS-PHT-00001-001" / "notes.txt"
    notes.write_text("a user's own")
    edited = cohort / "BraTS-PHT-00001-000" / "BraTS-PHT-00001-000-seg.nii.gz"
    edited.write_bytes(b"corrected by hand")
    make_cohort(cohort, 1, 6, TINY)
    after = {name: data for name, (_, data) in state(cohort).items()}
    # The first case is that of the new seed; of the others only what was not made here is left.
    first = {name for name in before if name.startswith("BraTS-PHT-00000-000/")}
    assert set(after) == first | {"BraTS-PHT-00001-000/BraTS-PHT-00001-000-seg.nii.gz"}
    assert all(after[name] != before[name] for name in first)
    assert notes.read_text() == "a user's own"
    record = json.loads((cohort / RECORD).read_text())
    assert record["seed"] == 6
    assert list(record["cases"]) == ["BraTS-PHT-00000-000"]


def test_a_forged_record_removes_nothing_outside(cohort: Path) -> None:
    victim = cohort.parent / "elsewhere" / "..-seg.nii.gz"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    path = cohort / RECORD
    record = json.loads(path.read_text())
    digest = hashlib.sha256(b"precious").hexdigest()
    record["cases"]["../elsewhere"] = {victim.name: digest, "../elsewhere-seg.nii.gz": digest}
    path.write_text(json.dumps(record))
    make_cohort(cohort, 1, 6, TINY)
    assert victim.read_bytes() == b"precious"


def test_a_shorter_cohort_drops_the_rest(cohort: Path) -> None:
    kept = {name: value for name, value in state(cohort).items() if "00000" in name}
    assert make_cohort(cohort, 1, 5, TINY) == ["BraTS-PHT-00000-000"]
    assert state(cohort) == kept
    assert sorted(path.name for path in cohort.iterdir()) == ["BraTS-PHT-00000-000", RECORD]
    assert list(json.loads((cohort / RECORD).read_text())["cases"]) == ["BraTS-PHT-00000-000"]


def test_workers_make_the_same_files(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("parallel")
    make_cohort(other, 3, 5, TINY, workers=2)
    assert {n: d for n, (_, d) in state(other).items()} == {n: d for n, (_, d) in state(cohort).items()}


def test_a_cohort_without_lesions(tmp_path: Path) -> None:
    (name,) = make_cohort(tmp_path, 1, 5, TINY, lesions=False)
    assert not read_label_map(tmp_path / name / f"{name}-seg.nii.gz").array.any()
    assert read_volume(tmp_path / name / f"{name}-t2f.nii.gz").array.max() > 50
