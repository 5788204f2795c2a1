"""Files that verify has hashed are inflated up to the slices alone, and what is stored is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.config import Config, build_config
from medsam_lora.io.manifest import discover, read_manifest, write_manifest
from medsam_lora.io.partial import VERIFIED_FILE, read_verified
from medsam_lora.io.store import open_case
from medsam_lora.records import CaseRecord
from medsam_lora.stages.prepare import plan_from_config, prepare
from medsam_lora.stages.prepare_jobs import Job
from medsam_lora.stages.verify import verify

SHAPE = (20, 16, 10)
LPS = np.array([[-1.0, 0, 0, 19], [0, -1.0, 0, 15], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
UPSIDE_DOWN = np.diag([1.0, 1.0, -1.0, 1.0])
SIDEWAYS = np.array([[0, 0, 1.0, 3], [-1.0, 0, 0, 20], [0, 1.0, 0, -7], [0, 0, 0, 1]])
CASES = ("BraTS-MEN-00001-000", "BraTS-MEN-00002-000")


def cohort(root: Path, affine: np.ndarray = LPS, dtype: type = np.int16, slope: float | None = None) -> Path:
    """Two training cases whose tumour fills most of plane 4 along array axis 2."""
    for number, case_id in enumerate(CASES):
        generator = np.random.default_rng(number)
        (root / case_id).mkdir(parents=True)
        for suffix in ("t1n", "t1c", "t2f", "t2w", "seg"):
            voxels = np.zeros(SHAPE, dtype)
            voxels[3:17, 3:12, 1:9] = generator.integers(1, 900, (14, 9, 8))
            if suffix == "seg":
                voxels = np.zeros(SHAPE, np.uint8)
                voxels[7:11, 6:9, 3:6] = 2
                voxels[9 + number, 6:10, 4] = 3  # the case makes the file another
            image = nib.Nifti1Image(voxels, affine)
            image.set_qform(affine, 1)
            if slope is not None and suffix != "seg":
                image.header.set_slope_inter(slope, 0)
            nib.save(image, root / case_id / f"{case_id}-{suffix}.nii.gz")
    write_manifest(root / "m.csv", [CaseRecord(**{**vars(r), "split": "train"}) for r in discover(root)])
    return root / "m.csv"


def config(**slicing: Any) -> Config:
    sections = {
        "slicing": {"name": "max_slice", **slicing},
        "crop": {"size": [14, 12]},
        "intensity": {"scope": "slice"},
    }
    return build_config(sections)


def job(manifest: Path, settings: Config, out: Path) -> Job:
    records = read_manifest(manifest)
    known = read_verified(manifest.with_name(VERIFIED_FILE))
    return Job(records[0], manifest.parent, plan_from_config(settings, records), out, 2**30, known)


@pytest.mark.parametrize("affine", [LPS, UPSIDE_DOWN], ids=["LPS", "upside down"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.float32])
@pytest.mark.parametrize("slicing", [{}, {"name": "every_second"}, {"name": "full"}], ids=["max", "second", "full"])
def test_what_is_stored_is_the_same(tmp_path: Path, affine: np.ndarray, dtype: type, slicing: dict[str, str]) -> None:
    manifest = cohort(tmp_path / "data", affine, dtype)
    settings = config(**slicing)
    whole, outcome = prepare(manifest, None, tmp_path / "whole", settings)
    assert outcome.done == list(CASES)
    assert verify(manifest, out=manifest.with_name("findings.csv")) == []
    taken = job(manifest, settings, tmp_path).read_chosen()
    planes = {"max_slice": (4,), "every_second": (3, 5), "full": (3, 4, 5)}[settings.slicing.name]
    assert taken.planes == planes and taken.image.shape == (4, *SHAPE[:2], len(planes))
    part, outcome = prepare(manifest, None, tmp_path / "part", settings)
    assert outcome.done == list(CASES) and part.name == whole.name
    for case_id in CASES:
        ours, theirs = (open_case(store / case_id, check_hash=True) for store in (part, whole))
        assert ours.ks == theirs.ks and ours.crop.matches(theirs.crop) and ours.image.dtype == theirs.image.dtype
        for name in ("image", "label", "mean", "std"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.report["tumour_voxels"] == theirs.report["tumour_voxels"]
        assert ours.report["brain_voxels"] is None and theirs.report["brain_voxels"] > 0


def test_the_whole_is_read_where_the_slices_do_not_say_enough(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "data")
    verify(manifest, out=manifest.with_name("findings.csv"))
    volume = build_config({"slicing": {"name": "max_slice"}, "crop": {"size": [14, 12]}})
    with_empty = config(name="full", empty_share=0.3)
    assert job(manifest, config(), tmp_path).read_chosen().planes == (4,)
    for settings in (volume, with_empty):
        assert job(manifest, settings, tmp_path).read_chosen().planes is None


@pytest.mark.parametrize("how", [{"affine": SIDEWAYS}, {"slope": 0.5}], ids=["sideways", "scaled"])
def test_the_whole_is_read_of_files_of_another_make(tmp_path: Path, how: dict[str, Any]) -> None:
    manifest = cohort(tmp_path / "data", **how)
    verify(manifest, out=manifest.with_name("findings.csv"))
    assert job(manifest, config(), tmp_path).read_chosen().planes is None


def test_a_file_that_changed_since_is_read_whole_and_its_damage_found(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "data")
    verify(manifest, out=manifest.with_name("findings.csv"))
    path = manifest.parent / CASES[0] / f"{CASES[0]}-t2w.nii.gz"
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # the checksum, far behind the slice
    path.write_bytes(bytes(data))
    store, outcome = prepare(manifest, None, tmp_path / "out", config())
    assert outcome.done == [CASES[1]] and [f.code for f in outcome.failed] == ["unreadable"]
    assert path.name in outcome.failed[0].file and not (store / CASES[0]).exists()


def test_cases_with_faults_are_not_noted_as_verified(tmp_path: Path) -> None:
    manifest = cohort(tmp_path / "data", dtype=np.float32)
    path = manifest.parent / CASES[1] / f"{CASES[1]}-t1c.nii.gz"
    image = nib.load(path)
    voxels = np.array(image.dataobj)
    voxels[5, 5, 8] = np.nan
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)
    for nonfinite in ("reject", "zero"):
        verify(manifest, out=manifest.with_name("findings.csv"), nonfinite=nonfinite)  # type: ignore[arg-type]
        assert {case_id for case_id, _ in read_verified(manifest.with_name(VERIFIED_FILE))} == {CASES[0]}
    assert read_verified(tmp_path / "nothing.csv") == {}
