"""The prepare stage on small cases on disk."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.config import Config, build_config
from medsam_lora.errors import DataError, ManifestError
from medsam_lora.io.case import read_case
from medsam_lora.io.manifest import discover, read_manifest, write_manifest
from medsam_lora.io.store import open_case, open_store, read_index
from medsam_lora.io.tables import FINDING_COLUMNS, read_table
from medsam_lora.records import CaseRecord, Finding
from medsam_lora.stages import prepare as stage
from medsam_lora.stages import prepare_jobs as jobs_module
from medsam_lora.stages.prepare import plan_from_config, prepare
from medsam_lora.transforms.stages import PreparePlan, prepare_case

SHAPE = (20, 16, 10)
LPS = np.array([[-1.0, 0, 0, 19], [0, -1.0, 0, 15], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])

# Extents along native X and Y. As the files are LPS, the oriented X of 4:14 is 6:16.
BRAINS = {
    "BraTS-MEN-00001-000": (slice(4, 14), slice(3, 12)),
    "BraTS-MEN-00002-000": (slice(5, 15), slice(4, 11)),
    "BraTS-MEN-00003-000": (slice(2, 15), slice(4, 11)),
    "BraTS-MEN-00004-000": (slice(6, 13), slice(5, 11)),
}
SPLITS = dict(zip(BRAINS, ("train", "train", "test", "val"), strict=True))
A, B, C, D = BRAINS


def write_files(root: Path, case_id: str, tumour_x: slice = slice(7, 11)) -> None:
    generator = np.random.default_rng(list(case_id.encode()))
    brain = np.zeros(SHAPE, bool)
    brain[(*BRAINS[case_id], slice(1, 9))] = True
    for suffix in ("t1n", "t1c", "t2f", "t2w", "seg"):
        voxels = np.where(brain, generator.integers(1, 900, SHAPE), 0).astype(np.int16)
        if suffix == "seg":
            voxels[:] = 0
            voxels[tumour_x, 6:9, 3:6] = 2
            voxels[9, 6:10, 4] = 3  # slice 4 shows the most
        image = nib.Nifti1Image(voxels, LPS)
        image.set_qform(LPS, 1)
        (root / case_id).mkdir(parents=True, exist_ok=True)
        nib.save(image, root / case_id / f"{case_id}-{suffix}.nii.gz")


def manifest_of(root: Path, splits: dict[str, str] = SPLITS) -> Path:
    records = [
        CaseRecord(r.case_id, r.patient_id, splits[r.case_id], r.files, r.label_convention, r.sha256)
        for r in discover(root)
    ]
    write_manifest(root / "m.csv", records)
    return root / "m.csv"


@pytest.fixture
def cohort(tmp_path) -> Path:
    root = tmp_path / "data"
    for case_id in BRAINS:
        write_files(root, case_id)
    return manifest_of(root)


def config(**sections: dict) -> Config:
    return build_config(sections)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()
    }


def rows_of(store: Path) -> dict[str, dict[str, str]]:
    return {row["case_id"]: row for row in read_table(store / "prepare.csv", ("case_id", "status"))}


def test_the_store_holds_what_prepare_case_makes_with_the_crop_of_the_training_split(cohort, tmp_path):
    store, outcome = prepare(cohort, None, tmp_path / "out", config())
    assert outcome.done == list(BRAINS) and not outcome.failed and not outcome.skipped and outcome.exit_code == 0
    plan = PreparePlan.from_json(json.loads((store / "plan.json").read_text()))
    assert store.name == plan.fingerprint()
    # Oriented X = 20 - native: the union 4:15 becomes 5:16, which is -5 to 6 from the centre 10. Y: 16 - (3:12) =
    # 4:13, -4 to 5 from the centre 8. About the image centre: 12 x 10. Case C, not trained on, is wider.
    crop = json.loads((store / "crop.json").read_text())
    assert crop["size"] == [12, 10]
    assert crop["brain_box"] == {
        "low": [-5.0, -4.0],
        "high": [6.0, 5.0],
        "plane": [20, 16],
        "fitted_over": "train",
        "n_cases": 2,
    }
    for record in read_manifest(cohort):
        case = read_case(record, cohort.parent)
        expected = prepare_case(case, plan)
        found = open_case(store / record.case_id, check_hash=True)
        assert found.split == SPLITS[record.case_id] and found.crop.shape == (12, 10, 10)
        np.testing.assert_array_equal(found.image, expected.image)
        np.testing.assert_array_equal(found.label, expected.label)
        np.testing.assert_array_equal(found.mean, expected.mean)
        assert found.ks == (3, 4, 5)
        # The voxel (7, 6, 3) of the file is (12, 9, 3) oriented, and (12 - 4, 9 - 3) in the crop.
        np.testing.assert_array_equal(found.image[0, :, 8, 6], case.image[:, 7, 6, 3])
    rows = rows_of(store)
    # Of C's 13 columns 2:15 native, 5:18 oriented, the crop 4:16 keeps 11: 2 x 7 x 8 voxels are lost.
    assert rows[C]["brain_voxels_lost"] == "112" and rows[C]["tumour_voxels_lost"] == "0"
    assert rows[A]["brain_voxels_lost"] == "0" and rows[A]["n_slices"] == "3" and rows[A]["status"] == "done"
    assert [case.case_id for case in open_store(store)] == list(BRAINS)
    assert read_table(store / "failures.csv", FINDING_COLUMNS) == []


def test_a_second_run_does_nothing_and_reads_no_voxel(cohort, tmp_path, monkeypatch):
    out = tmp_path / "out"
    store, _ = prepare(cohort, None, out, config())
    before = snapshot(store)
    monkeypatch.setattr(jobs_module, "read_case", None)
    again, outcome = prepare(cohort, None, out, config())
    assert again == store and outcome.skipped == list(BRAINS) and not outcome.done
    after = snapshot(store)
    assert {k: v for k, v in after.items() if "/" in k} == {k: v for k, v in before.items() if "/" in k}
    assert {row["status"] for row in rows_of(store).values()} == {"skipped"}
    assert rows_of(store)[C]["brain_voxels_lost"] == "112"


def test_only_a_changed_source_or_convention_or_a_damaged_case_is_done_again(cohort, tmp_path):
    out = tmp_path / "out"
    fixed = config(crop={"size": [14, 12]})
    store, _ = prepare(cohort, None, out, fixed)
    write_files(cohort.parent, B, slice(8, 11))
    _, outcome = prepare(manifest_of(cohort.parent), None, out, fixed)
    assert outcome.done == [B] and len(outcome.skipped) == 3
    assert int(np.count_nonzero(open_case(store / B).label[0])) == 9
    (store / A / "image.npy").write_bytes(b"")
    _, outcome = prepare(cohort, None, out, fixed)
    assert outcome.done == [A]
    text = cohort.read_text().replace("brats2023", "msd", 1)
    cohort.write_text(text)
    _, outcome = prepare(cohort, None, out, fixed)
    assert outcome.done == [A] and read_index(store / A)["label_convention"] == "msd"
    assert 1 in open_case(store / A).label, "the labels were converted anew: 2 of MSD is necrosis"


def test_a_new_split_reaches_the_store_without_work(cohort, tmp_path):
    fixed = config(crop={"size": [14, 12]})
    store, _ = prepare(cohort, None, tmp_path / "out", fixed)
    before = (store / A / "image.npy").stat().st_mtime_ns
    dealt = manifest_of(cohort.parent, SPLITS | {A: "test", C: "train"})
    again, outcome = prepare(dealt, None, tmp_path / "out", fixed)
    assert again == store and outcome.skipped == list(BRAINS)
    assert [case.split for case in open_store(store)] == ["test", "train", "train", "val"]
    assert (store / A / "image.npy").stat().st_mtime_ns == before


def test_splits_do_not_mix_where_training_is_sliced_otherwise(cohort, tmp_path):
    largest = config(crop={"size": [14, 12]}, slicing={"name": "max_slice"})
    store, _ = prepare(cohort, None, tmp_path / "out", largest)
    assert [case.ks for case in open_store(store)] == [(4,), (4,), (3, 4, 5), (3, 4, 5)]
    dealt = manifest_of(cohort.parent, SPLITS | {A: "test", C: "train"})
    other, outcome = prepare(dealt, None, tmp_path / "out", largest)
    assert other != store and outcome.done == list(BRAINS)
    assert [case.ks for case in open_store(other)] == [(3, 4, 5), (4,), (4,), (3, 4, 5)]
    assert [case.ks for case in open_store(store)] == [(4,), (4,), (3, 4, 5), (3, 4, 5)]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_bad_case_is_reported_and_the_others_are_done(cohort, tmp_path, workers):
    path = cohort.parent / A / f"{A}-t1c.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    write_files(cohort.parent, C, slice(0, 11))  # tumour at oriented X 9:20, the crop ends at 17
    cohort = manifest_of(cohort.parent)
    store, outcome = prepare(cohort, None, tmp_path / "out", config(crop={"size": [14, 12]}), workers=workers)
    assert outcome.done == [B, D] and outcome.exit_code == 1
    assert [(f.case_id, f.code) for f in outcome.failed] == [(A, "truncated"), (C, "tumour_cropped")]
    assert outcome.failed[0].file == f"{A}/{A}-t1c.nii.gz"
    # 3 of 11 columns, 3 rows and slices each: 27 of the 99 + 1 (label 3 adds row 9 in slice 4) voxels.
    assert "27 of 100 tumour voxels" in outcome.failed[1].detail
    assert "crop.allow_tumour_loss=true" in outcome.failed[1].remedy
    assert [row["case_id"] for row in read_table(store / "failures.csv", FINDING_COLUMNS)] == [A, C]
    assert [row["status"] for row in rows_of(store).values()] == ["failed", "done", "failed", "done"]
    assert not (store / A).exists() and not (store / C).exists()
    assert [case.case_id for case in open_store(store)] == [B, D]
    allowed = config(crop={"size": [14, 12], "allow_tumour_loss": True})
    store, outcome = prepare(cohort, None, tmp_path / "out", allowed)
    assert [f.case_id for f in outcome.failed] == [A] and rows_of(store)[C]["tumour_voxels_lost"] == "27"


def test_workers_make_the_same_store(cohort, tmp_path):
    one, _ = prepare(cohort, None, tmp_path / "one", config())
    two, outcome = prepare(cohort, None, tmp_path / "two", config(), workers=2)
    assert one.name == two.name and outcome.done == list(BRAINS)
    for case_id in BRAINS:
        for name in ("image.npy", "label.npy", "index.json"):
            assert (one / case_id / name).read_bytes() == (two / case_id / name).read_bytes()


def test_a_training_case_that_cannot_be_read_is_left_out_of_the_fit_until_it_can(cohort, tmp_path):
    path = cohort.parent / A / f"{A}-t1c.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    store, outcome = prepare(cohort, None, tmp_path / "out", config())
    assert [f.case_id for f in outcome.failed] == [A]
    assert json.loads((store / "crop.json").read_text())["brain_box"]["n_cases"] == 1
    path.write_bytes(whole)
    store, outcome = prepare(cohort, None, tmp_path / "out", config())
    assert not outcome.failed and json.loads((store / "crop.json").read_text())["brain_box"]["n_cases"] == 2


def test_without_training_cases_the_crop_is_fitted_over_all_and_says_so(cohort, tmp_path):
    tests = manifest_of(cohort.parent, dict.fromkeys(BRAINS, "test"))
    store, outcome = prepare(tests, None, tmp_path / "out", config())
    box = json.loads((store / "crop.json").read_text())["brain_box"]
    assert not outcome.failed and box["fitted_over"] == "all" and box["n_cases"] == 4
    assert [row["brain_voxels_lost"] for row in rows_of(store).values()] == ["0"] * 4


def test_no_usable_case_to_fit_the_crop_stops(cohort, tmp_path):
    for case_id in (A, B):
        (cohort.parent / case_id / f"{case_id}-t2f.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 2 cases") as caught:
        prepare(cohort, None, tmp_path / "out", config())
    assert caught.value.case_id == A and "crop.size" in str(caught.value.remedy)
    with pytest.raises(ManifestError):
        prepare(tmp_path / "absent.csv", None, tmp_path / "out", config())


def test_a_full_disk_is_reported_for_the_case_it_hit(cohort, tmp_path, monkeypatch):
    real = stage.write_case

    def full(folder, slices, extra):
        if slices.case_id == B:
            raise OSError(28, "No space left on device")
        real(folder, slices, extra)

    monkeypatch.setattr(stage, "write_case", full)
    store, outcome = prepare(cohort, None, tmp_path / "out", config())
    assert [(f.case_id, f.code) for f in outcome.failed] == [(B, "prepare_failed")]
    assert "No space left" in outcome.failed[0].detail and outcome.done == [A, C, D]
    assert [case.case_id for case in open_store(store)] == [A, C, D]


def test_a_bug_is_not_taken_for_a_bad_case(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "prepare_case", lambda case, plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(cohort, None, tmp_path / "out", config())


def die_at_the_second_case(job: stage.Job) -> str:
    """Work for a process that the system kills, as where memory runs out."""
    if job.record.case_id == B:
        os._exit(9)
    return job.record.case_id


def test_a_worker_that_dies_is_reported_and_does_not_hang(cohort, tmp_path):
    plan = plan_from_config(config())
    jobs = [jobs_module.Job(record, cohort.parent, plan, tmp_path, 2**30) for record in read_manifest(cohort)]
    results = {job.record.case_id: result for job, result in jobs_module.each(die_at_the_second_case, jobs, 2, "test")}
    assert set(results) == set(BRAINS)
    died = results[B]
    assert isinstance(died, Finding) and died.code == "worker_died" and "--workers" in died.remedy
    # What the broken pool never came to is reported too, not dropped.
    assert all(result == case_id or result.code == "worker_died" for case_id, result in results.items())


def test_an_interruption_leaves_whole_cases_only(cohort, tmp_path, monkeypatch):
    real, seen = prepare_case, []

    def interrupted(case, plan):
        seen.append(case.record.case_id)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(case, plan)

    monkeypatch.setattr(stage, "prepare_case", interrupted)
    fixed = config(crop={"size": [14, 12]})
    with pytest.raises(KeyboardInterrupt):
        prepare(cohort, None, tmp_path / "out", fixed)
    monkeypatch.setattr(stage, "prepare_case", real)
    store, outcome = prepare(cohort, None, tmp_path / "out", fixed)
    assert outcome.skipped == [A, B] and outcome.done == [C, D]
    assert all(open_case(store / case_id, check_hash=True).case_id == case_id for case_id in BRAINS)


def test_a_root_elsewhere_a_subset_of_modalities_and_the_whole_plane(cohort, tmp_path):
    manifest = tmp_path / "elsewhere" / "m.csv"
    manifest.parent.mkdir()
    manifest.write_bytes(cohort.read_bytes())
    chosen = config(data={"modalities": ["t2f", "t1c"]}, crop={"name": "none"})
    store, outcome = prepare(manifest, cohort.parent, tmp_path / "out", chosen)
    assert not outcome.failed
    case = open_case(store / A)
    assert case.modalities == ("t1c", "t2f") and case.image.shape == (3, 2, 20, 16)
    assert not (tmp_path / "out" / "brain_boxes").exists()
    assert json.loads((store / "crop.json").read_text())["size"] is None


def test_the_tables_are_csv_with_their_columns(cohort, tmp_path):
    store, _ = prepare(cohort, None, tmp_path / "out", config())
    with (store / "prepare.csv").open(newline="") as handle:
        header = next(csv.reader(handle))
    assert ",".join(header) == (
        "case_id,split,status,n_slices,x,y,brain_voxels,brain_voxels_lost,tumour_voxels,tumour_voxels_lost,duration_s"
    )
    assert float(rows_of(store)[A]["duration_s"]) >= 0


@pytest.mark.real_data
def test_real_cases_lose_no_brain_of_the_training_split(brats_dir, tmp_path):
    records = discover(brats_dir)[:2]
    splits = ("train", "test")
    write_manifest(
        tmp_path / "m.csv",
        [
            CaseRecord(r.case_id, r.patient_id, s, r.files, r.label_convention, r.sha256)
            for r, s in zip(records, splits, strict=True)
        ],
    )
    store, outcome = prepare(tmp_path / "m.csv", brats_dir, tmp_path / "out", config())
    assert outcome.done == [r.case_id for r in records]
    rows = rows_of(store)
    assert rows[records[0].case_id]["brain_voxels_lost"] == "0"
    case = open_case(store / records[0].case_id)
    assert case.image.dtype == np.int16 and len(case.ks) > 20
    assert int(np.count_nonzero(case.label)) == int(rows[case.case_id]["tumour_voxels"]), "every tumour slice is there"
