"""Train and predict on a small synthetic cohort with a real model at toy size."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medsam_lora.config import Config, build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.errors import AdapterError, PreparedError, TrainingError
from medsam_lora.io.files import sha256_of
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.store import open_case
from medsam_lora.models.assemble import load_segmenter
from medsam_lora.models.checkpoint import load_adapter, save_adapter
from medsam_lora.models.sam import build
from medsam_lora.prompts.sources import read_box_table
from medsam_lora.stages import train as train_stage
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.predict import predict
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train
from medsam_lora.stages.training_cases import find_store

SETTINGS = {
    "model": {"name": "vit_nano", "weights": "random", "image_size": 64},
    "method": {"name": "lora", "rank": 2},
    "train": {"epochs": 1, "slices_per_epoch": 6, "batch_size": 3, "lr": 1e-3},
}


def config(**sections: dict) -> Config:
    return build_config({k: {**SETTINGS.get(k, {}), **sections.get(k, {})} for k in {*SETTINGS, *sections}})


class Cohort:
    """A cohort, its manifest and store, and one trained run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "cohort"
        make_cohort(self.root, 6, 5, (48, 56, 20))
        self.manifest = folder / "manifest.csv"
        build_manifest(self.root, self.manifest, {"train": 0.5, "val": 0.2, "test": 0.3}, 0)
        self.store, outcome = prepare(self.manifest, self.root, folder / "prepared", config())
        assert not outcome.failed
        self.run = folder / "lora"
        self.record = train(self.manifest, self.store, self.run, config(), device="cpu")
        self.predictions = folder / "predictions"
        outcome = predict(self.manifest, self.root, self.run, self.predictions, config(), split="test", device="cpu")
        self.tested = [r for r in read_manifest(self.manifest) if r.split == "test"]
        assert outcome.done == [r.case_id for r in self.tested] and not outcome.failed


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("cohort"))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def test_the_reloaded_adapter_was_found_equal(cohort: Cohort) -> None:
    check = cohort.record["reload_check"]
    assert check["largest_difference"] <= 1e-6 and len(check["dice"]) == cohort.record["n_val_cases"] > 0
    rows = list(csv.DictReader((cohort.run / "log.csv").open(newline="")))
    best = max(float(r["val_dice"]) for r in rows)
    assert best == pytest.approx(np.mean(check["dice"]), abs=1e-6)


def test_an_adapter_that_was_not_saved_right_fails_the_stage(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_the_decoder(path: Path, tensors: dict, metadata: dict) -> str:
        wrong = {n: torch.zeros_like(t) if n.startswith("mask_decoder") else t for n, t in tensors.items()}
        return save_adapter(path, wrong, metadata)

    monkeypatch.setattr(train_stage, "save_adapter", forget_the_decoder)
    with pytest.raises(TrainingError, match="read back from disk scores a Dice that differs"):
        train(cohort.manifest, cohort.store, tmp_path / "run", config(), device="cpu")


def test_lora_starts_at_the_zero_shot_score(cohort: Cohort, tmp_path: Path) -> None:
    zero = train(cohort.manifest, cohort.store, tmp_path / "zero", config(method={"name": "zero_shot"}), device="cpu")
    rows = list(csv.DictReader((cohort.run / "log.csv").open(newline="")))
    assert rows[0]["epoch"] == "0"
    assert float(rows[0]["val_dice"]) == pytest.approx(np.mean(zero["reload_check"]["dice"]), abs=1e-6)
    tensors, metadata = load_adapter(tmp_path / "zero" / "adapter.safetensors")
    assert not tensors and metadata["method"] == "zero_shot"
    assert (tmp_path / "zero" / "log.csv").read_text().startswith("epoch,loss")


def test_the_adapter_says_what_it_is(cohort: Cohort) -> None:
    tensors, metadata = load_adapter(cohort.run / "adapter.safetensors")
    assert metadata["modalities"] == ["t1n", "t1c", "t2f", "t2w"] and metadata["regions"] == ["WT"]
    assert metadata["plan"]["crop"]["box"]["fitted_over"] == "train"
    assert metadata["method_options"]["rank"] == 2 and len(metadata["base_sha256"]) == 64
    assert sum(t.numel() for t in tensors.values()) == cohort.record["trainable_parameters"]


def test_another_base_is_refused_with_both_hashes(cohort: Cohort, tmp_path: Path) -> None:
    tensors, metadata = load_adapter(cohort.run / "adapter.safetensors")
    metadata["model"]["seed"] = 99
    save_adapter(tmp_path / "other.safetensors", tensors, metadata)
    with pytest.raises(AdapterError, match=metadata["base_sha256"][:8]):
        load_segmenter(tmp_path / "other.safetensors")


def test_training_resumes_to_the_same_adapter(cohort: Cohort, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(cohort.run, again)
    (again / "adapter.safetensors").unlink()
    train(cohort.manifest, cohort.store, again, config(), device="cpu", resume=True)
    before, after = (load_adapter(p / "adapter.safetensors")[0] for p in (cohort.run, again))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(TrainingError, match="other settings"):
        train(cohort.manifest, cohort.store, again, config(train={"lr": 0.5}), device="cpu", resume=True)


def test_training_without_validation_cases_keeps_the_last_epoch(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [r for r in read_manifest(cohort.manifest) if r.split == "train"]
    write_manifest(tmp_path / "m.csv", records)
    with caplog.at_level("WARNING"):
        record = train(tmp_path / "m.csv", cohort.store, tmp_path / "run", config(), device="cpu")
    assert "no validation case" in caplog.text
    assert record["n_val_cases"] == 0 and record["reload_check"]["largest_difference"] <= 1e-6


def test_a_manifest_without_training_cases_or_a_foreign_store_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", cohort.tested)
    with pytest.raises(TrainingError, match="no case with a reference is in the split 'train'"):
        train(tmp_path / "m.csv", cohort.store, tmp_path / "run", config(), device="cpu")
    with pytest.raises(PreparedError, match="the store holds t1n, t1c, t2f, t2w"):
        train(cohort.manifest, cohort.store, tmp_path / "run", config(data={"modalities": ["t1c"]}), device="cpu")
    with pytest.raises(PreparedError, match="Run medsam-lora prepare first"):
        find_store(tmp_path)


def test_boxes_from_a_table_give_what_the_reference_boxes_gave(cohort: Cohort, tmp_path: Path) -> None:
    """The same prompts, said by a clinician, without any reference in the manifest."""
    blind = [
        type(r)(
            r.case_id,
            r.patient_id,
            r.split,
            {k: v for k, v in r.files.items() if k != "seg"},
            r.label_convention,
            r.sha256,
        )
        for r in cohort.tested
    ]
    write_manifest(tmp_path / "blind.csv", blind)
    table = cohort.predictions / "prompts.csv"
    outcome = predict(
        tmp_path / "blind.csv", cohort.root, cohort.run, tmp_path / "p", config(), boxes=table, device="cpu"
    )
    assert not outcome.failed
    for record in cohort.tested:
        name = f"{record.case_id}.nii.gz"
        np.testing.assert_array_equal(voxels(tmp_path / "p" / name), voxels(cohort.predictions / name))
    assert json.loads((tmp_path / "p" / "record.json").read_text())["prompt_source"] == "box_table"


def test_masks_stay_inside_slices_that_were_prompted(cohort: Cohort) -> None:
    boxes = read_box_table(cohort.predictions / "prompts.csv")
    for record in cohort.tested:
        mask = voxels(cohort.predictions / f"{record.case_id}.nii.gz")
        shown = set(np.flatnonzero(mask.any(axis=(0, 1))).tolist())
        assert shown and shown <= {box.k for box in boxes[record.case_id]}


def test_a_case_without_prompts_fails_and_the_others_are_done(cohort: Cohort, tmp_path: Path) -> None:
    first, *others = cohort.tested
    files = {k: v for k, v in first.files.items() if k != "seg"}
    blind = type(first)(first.case_id, first.patient_id, first.split, files, first.label_convention, first.sha256)
    write_manifest(tmp_path / "m.csv", [blind, *others])
    outcome = predict(tmp_path / "m.csv", cohort.root, cohort.run, tmp_path / "p", config(), device="cpu")
    assert [f.case_id for f in outcome.failed] == [first.case_id] and "--boxes" in outcome.failed[0].remedy
    assert outcome.done == [r.case_id for r in others] and outcome.exit_code == 1


def test_a_case_without_one_modality_is_predicted_from_the_others(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = cohort.tested[0]
    files = {k: v for k, v in first.files.items() if k != "t1c"}
    record = type(first)(first.case_id, first.patient_id, first.split, files, first.label_convention, first.sha256)
    write_manifest(tmp_path / "m.csv", [record])
    with caplog.at_level("WARNING"):
        outcome = predict(tmp_path / "m.csv", cohort.root, cohort.run, tmp_path / "p", config(), device="cpu")
    assert not outcome.failed and "predicted without t1c" in caplog.text
    assert voxels(tmp_path / "p" / f"{first.case_id}.nii.gz").any()


def test_what_is_predicted_already_is_skipped_unless_the_adapter_or_boxes_changed(
    cohort: Cohort, tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    shutil.copytree(cohort.predictions, folder)
    ids = [r.case_id for r in cohort.tested]
    again = predict(cohort.manifest, cohort.root, cohort.run, folder, config(), split="test", device="cpu")
    assert again.skipped == ids and not again.done
    (folder / f"{ids[0]}.nii.gz").unlink()
    again = predict(cohort.manifest, cohort.root, cohort.run, folder, config(), split="test", device="cpu")
    assert again.done == ids[:1] and again.skipped == ids[1:]
    other = config(predict={"threshold": 0.9})
    assert predict(cohort.manifest, cohort.root, cohort.run, folder, other, split="test", device="cpu").done == ids


def test_boxes_that_leave_the_volume_fail_their_case(cohort: Cohort, tmp_path: Path) -> None:
    case_id = cohort.tested[0].case_id
    (tmp_path / "b.csv").write_text(f"case_id,k,i0,j0,i1,j1\n{case_id},3,10,10,400,30\n")
    outcome = predict(
        cohort.manifest,
        cohort.root,
        cohort.run,
        tmp_path / "p",
        config(),
        boxes=tmp_path / "b.csv",
        split="test",
        device="cpu",
    )
    details = {f.case_id: f.detail for f in outcome.failed}
    assert "leave the volume" in details[case_id]
    assert all("no line for this case" in d for i, d in details.items() if i != case_id)


def test_relative_weights_are_found_from_another_folder(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(build("vit_nano", "random", 64).state_dict(), "base.pt")
    settings = config(model={"weights": "base.pt"}, method={"name": "zero_shot"})
    train(cohort.manifest, cohort.store, tmp_path / "run", settings, device="cpu")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_segmenter(tmp_path / "run" / "adapter.safetensors")[0].sam
    assert again.base_sha256 == sha256_of(tmp_path / "base.pt")


def test_tensorboard_events_are_an_extra(cohort: Cohort, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra: pip install 'medsam-lora[track]'")
    train(cohort.manifest, cohort.store, tmp_path / "run", config(train={"tensorboard": True}), device="cpu")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.*"))


@pytest.mark.parametrize("nonfinite", ["reject", "zero"])
def test_voxels_that_are_no_numbers_are_taken_as_in_preparation(cohort: Cohort, tmp_path: Path, nonfinite: str) -> None:
    record, *_ = cohort.tested
    root, run, manifest = tmp_path / "cohort", tmp_path / "run", tmp_path / "manifest.csv"
    shutil.copytree(cohort.root, root)
    path = next(root.rglob(f"{record.case_id}-t1c.nii.gz"))
    image = nib.load(path)
    data = image.get_fdata(dtype=np.float32)
    data[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine), path)
    write_manifest(manifest, [record])
    tensors, metadata = load_adapter(cohort.run / "adapter.safetensors")
    assert metadata["plan"]["nonfinite"] == "reject"
    metadata["plan"]["nonfinite"] = nonfinite
    run.mkdir()
    save_adapter(run / "adapter.safetensors", tensors, metadata)
    outcome = predict(manifest, root, run, tmp_path / "out", config(), device="cpu")
    if nonfinite == "reject":
        assert [(f.case_id, f.code) for f in outcome.failed] == [(record.case_id, "nonfinite")]
    else:
        assert outcome.done == [record.case_id]
        masks = [folder / f"{record.case_id}.nii.gz" for folder in (tmp_path / "out", cohort.predictions)]
        assert np.array_equal(*map(voxels, masks))


def test_two_processes_train_one_adapter(cohort: Cohort, tmp_path: Path) -> None:
    """The same batches as one process, so the same scores but for rounding; one folder, written once."""
    both = config(train={"processes": 2})
    record = train(cohort.manifest, cohort.store, tmp_path / "run", both, device="cpu")
    assert record["processes"] == 2 and record == json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["reload_check"]["dice"] == pytest.approx(cohort.record["reload_check"]["dice"], abs=0.02)
    own, theirs = (load_adapter(run / "adapter.safetensors")[0] for run in (tmp_path / "run", cohort.run))
    assert own.keys() == theirs.keys()
    assert all(torch.isfinite(tensor).all() for tensor in own.values())
    files = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file())
    expected = sorted(str(path.relative_to(cohort.run)) for path in cohort.run.rglob("*") if path.is_file())
    assert files == expected
    with pytest.raises(TrainingError, match="fitted needs validation cases"):
        alone = tmp_path / "train_only.csv"
        write_manifest(alone, [r for r in read_manifest(cohort.manifest) if r.split == "train"])
        wrong = config(train={"processes": 2, "postprocess": "fitted"})
        train(alone, cohort.store, tmp_path / "wrong", wrong, device="cpu")


def test_a_second_prediction_with_other_boxes_takes_the_embeddings_of_the_first(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a method that adapts every block, as an adapter does not change any more."""
    room = config(train={"cache_gib": 1.0}, predict={"keep_embeddings": True})
    first = tmp_path / "first"
    predict(cohort.manifest, cohort.root, cohort.run, first, room, split="test", device="cpu")
    for record in cohort.tested:
        assert np.array_equal(
            voxels(first / f"{record.case_id}.nii.gz"), voxels(cohort.predictions / f"{record.case_id}.nii.gz")
        )
    rows = list(csv.DictReader((first / "prompts.csv").open(newline="")))
    with (tmp_path / "boxes.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "i1": float(row["i1"]) + 1} for row in rows if float(row["i1"]) < 47)

    def never(self: object, pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the image encoder ran again")

    monkeypatch.setattr("medsam_lora.models.sam.SamModel.encode", never)
    boxes = tmp_path / "boxes.csv"
    out = tmp_path / "second"
    outcome = predict(cohort.manifest, cohort.root, cohort.run, out, room, boxes=boxes, split="test", device="cpu")
    assert outcome.done and not outcome.failed


def test_the_unpadded_grid_is_recorded_and_used_at_prediction(cohort: Cohort, tmp_path: Path) -> None:
    run = tmp_path / "unpadded"
    record = train(cohort.manifest, cohort.store, run, config(model={"grid": "unpadded"}), device="cpu")
    assert record["reload_check"]["largest_difference"] <= 1e-6
    _, metadata = load_adapter(run / "adapter.safetensors")
    assert metadata["grid"] == metadata["model"]["grid"] == "unpadded"
    segmenter, _ = load_segmenter(run / "adapter.safetensors")
    folder = cohort.store / cohort.tested[0].case_id
    crop = open_case(folder).crop.shape
    assert min(segmenter.frame(crop[:2])) < 64, f"slices of {crop} fill the frame: nothing is tested here"
    # A configuration that says nothing of the grid, and one that says the same, predict; another one is refused.
    said = predict(
        cohort.manifest,
        cohort.root,
        run,
        tmp_path / "a",
        config(model={"grid": "unpadded"}),
        split="test",
        device="cpu",
    )
    silent = predict(cohort.manifest, cohort.root, run, tmp_path / "b", config(), split="test", device="cpu")
    assert said.done == silent.done == [r.case_id for r in cohort.tested]
    for case_id in said.done:
        assert np.array_equal(
            voxels(tmp_path / "a" / f"{case_id}.nii.gz"), voxels(tmp_path / "b" / f"{case_id}.nii.gz")
        )
    with pytest.raises(AdapterError, match=r"on the unpadded grid.*Set model\.grid=unpadded"):
        predict(cohort.manifest, cohort.root, run, tmp_path / "c", config(model={"grid": "padded"}), device="cpu")


def test_attention_may_be_computed_another_way_at_prediction(cohort: Cohort) -> None:
    path = cohort.run / "adapter.safetensors"
    other, _ = load_segmenter(path, attention="reference")
    same, _ = load_segmenter(path)
    assert (other.sam.image_encoder.attention, same.sam.image_encoder.attention) == ("reference", "auto")
    z = torch.randn(1, 4, 40, 56, generator=torch.Generator().manual_seed(0))
    boxes = [np.array([[5.0, 5.0, 30.0, 30.0]])]
    with torch.no_grad():
        expected, found = other(z, boxes).logits, same(z, boxes).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
