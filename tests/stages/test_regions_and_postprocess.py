"""Three regions and fitted clean-up through the stages, from training to rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsam_lora import labels
from medsam_lora.config import Config, build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.errors import TrainingError
from medsam_lora.inference import postprocess
from medsam_lora.io.manifest import read_manifest, write_manifest
from medsam_lora.io.seg_nrrd import read_seg_nrrd
from medsam_lora.models.checkpoint import load_adapter
from medsam_lora.stages import train as train_stage
from medsam_lora.stages.check_submission import check_submission
from medsam_lora.stages.evaluate import evaluate
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.predict import predict
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train

REGIONS = ["WT", "TC", "ET"]


def config(method: str = "decoder_only", **train_options: object) -> Config:
    options = {"epochs": 1, "slices_per_epoch": 6, "batch_size": 3, "regions": REGIONS, **train_options}
    model = {"name": "vit_nano", "weights": "random", "image_size": 64}
    return build_config({"model": model, "method": {"name": method}, "train": options})


class Cohort:
    """A cohort with its manifest and store."""

    def __init__(self, folder: Path) -> None:
        self.root, self.manifest = folder / "cohort", folder / "manifest.csv"
        make_cohort(self.root, 6, 5, (48, 56, 20))
        build_manifest(self.root, self.manifest, {"train": 0.5, "val": 0.2, "test": 0.3}, 0)
        self.store, _ = prepare(self.manifest, self.root, folder / "prepared", config())
        self.test_cases = [r.case_id for r in read_manifest(self.manifest) if r.split == "test"]

    def predicted(self, run: Path, settings: Config) -> Path:
        train(self.manifest, self.store, run, settings, device="cpu")
        out = run / "predictions"
        outcome = predict(self.manifest, self.root, run, out, settings, split="test", device="cpu")
        assert outcome.done == self.test_cases
        return out


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("regions"))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def test_three_regions_are_written_as_brats_labels_and_scored(cohort: Cohort, tmp_path: Path) -> None:
    out = cohort.predicted(tmp_path / "run", config())
    record = json.loads((out / "record.json").read_text())
    assert record["regions"] == REGIONS and record["labels"] == {"1": "NETC", "2": "SNFH", "3": "ET"}
    assert record["regions_from"] == "training" and record["postprocess"] == "none"
    assert Path(record["manifest"]) == cohort.manifest.resolve() and Path(record["root"]) == cohort.root.resolve()
    for case_id in cohort.test_cases:
        label_map = voxels(out / f"{case_id}.nii.gz")
        assert set(np.unique(label_map)) <= {0, 1, 2, 3}
        again, _, segments = read_seg_nrrd(out / f"{case_id}.seg.nrrd")
        assert np.array_equal(again, label_map) and [s.label for s in segments] == [1, 2, 3]
    # Of the submission rules only those of the grid, which is a phantom's, are broken.
    assert {f.code for f in check_submission(out, cohort.test_cases)}.isdisjoint({"wrong_label", "unexpected_label"})
    rows, outcome = evaluate(cohort.manifest, cohort.root, out, tmp_path / "scores", challenge="brats2023-gli")
    assert not outcome.failed
    mine = {(r["case_id"], r["region"]): r for r in rows if r["method"] == "decoder_only"}
    assert set(mine) == {(c, r) for c in cohort.test_cases for r in REGIONS}
    for case_id in cohort.test_cases:
        volumes = [mine[case_id, region]["prediction_volume_ml"] for region in REGIONS]
        assert volumes[0] >= volumes[1] >= volumes[2]
    assert {r["challenge"] for r in rows} == {"brats2023-gli"} and {r["postprocess"] for r in rows} == {"none"}


def test_zero_shot_says_that_its_regions_are_by_area(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        out = cohort.predicted(tmp_path / "run", config("zero_shot"))
    assert "by descending area" in caplog.text
    assert "descending area" in json.loads((out / "record.json").read_text())["regions_from"]


def test_a_reference_that_shows_no_core_trains_no_core(cohort: Cohort, tmp_path: Path) -> None:
    records = [r.__class__(**{**vars(r), "label_convention": "binary"}) for r in read_manifest(cohort.manifest)]
    root = tmp_path / "cohort"
    for record in records:
        for name, file in record.files.items():
            image = nib.load(cohort.root / file)
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if name == "seg":
                image = nib.Nifti1Image((voxels(cohort.root / file) > 0).astype(np.uint8), image.affine)
            nib.save(image, root / file)
    write_manifest(tmp_path / "m.csv", [r.__class__(**{**vars(r), "sha256": ""}) for r in records])
    store, outcome = prepare(tmp_path / "m.csv", root, tmp_path / "prepared", config())
    assert not outcome.failed
    with pytest.raises(TrainingError, match="'binary' does not show TC, ET"):
        train(tmp_path / "m.csv", store, tmp_path / "run", config(), device="cpu")
    train(tmp_path / "m.csv", store, tmp_path / "run", config(regions=["WT"]), device="cpu")


def test_clean_up_is_fitted_on_validation_cases_and_applied(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted_on: list[str] = []
    fit = postprocess.fit

    def note(cases: list[postprocess.ValidationCase], regions: tuple[str, ...]) -> dict[str, postprocess.CleanUp]:
        fitted_on.extend(case.case_id for case in cases)
        chosen = fit(cases, regions)
        # A random decoder's masks may need no cleaning; a limit above all of them shows that it is applied.
        return {region: postprocess.CleanUp(1e6) for region in chosen}

    monkeypatch.setattr(train_stage.postprocess, "fit", note)
    out = cohort.predicted(tmp_path / "run", config(postprocess="fitted"))
    assert fitted_on == [r.case_id for r in read_manifest(cohort.manifest) if r.split == "val"]
    _, metadata = load_adapter(tmp_path / "run" / "adapter.safetensors")
    assert metadata["postprocess"]["ET"] == {"min_component_ml": 1e6, "fill_holes": False}
    assert all(not voxels(out / f"{case_id}.nii.gz").any() for case_id in cohort.test_cases)
    rows, _ = evaluate(cohort.manifest, cohort.root, out, tmp_path / "scores")
    words = "WT: components under 1e+06 ml removed"
    table = list(csv.DictReader((tmp_path / "scores" / "per_case.csv").open(newline="")))
    assert {r["postprocess"].split(";")[0] for r in table if r["method"] == "decoder_only"} == {words}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["postprocess"].startswith(words)
    assert {r["postprocess"] for r in rows if r["method"] == "filled_box"} == {"none"}


def test_clean_up_without_validation_cases_is_refused_before_training(cohort: Cohort, tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.csv", [r for r in read_manifest(cohort.manifest) if r.split == "train"])
    with pytest.raises(TrainingError, match="needs validation cases"):
        train(tmp_path / "m.csv", cohort.store, tmp_path / "run", config(postprocess="fitted"), device="cpu")
    assert not (tmp_path / "run" / "log.csv").exists()


def test_the_regions_of_a_prediction_are_those_of_its_label_map(cohort: Cohort, tmp_path: Path) -> None:
    out = cohort.predicted(tmp_path / "run", config())
    rows, _ = evaluate(cohort.manifest, cohort.root, out, tmp_path / "scores")
    label_map = voxels(out / f"{cohort.test_cases[0]}.nii.gz")
    for row in rows:
        if row["case_id"] == cohort.test_cases[0] and row["method"] == "decoder_only":
            # Voxels of the phantom are cubes of a size that the volume in the row must have used.
            n = int(labels.region_mask(label_map, row["region"]).sum())
            voxel_ml = abs(np.linalg.det(nib.load(out / f"{cohort.test_cases[0]}.nii.gz").affine[:3, :3])) / 1000
            assert row["prediction_volume_ml"] == pytest.approx(n * voxel_ml, rel=1e-6)
