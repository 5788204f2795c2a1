"""vit_nano as it is embedded: a promptable model, not random weights. What other tests need of one is tested here."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from medsam_lora.config import Config, build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.datasets.scenes import Scene, make_scene
from medsam_lora.datasets.shapes import make_sample
from medsam_lora.models import MODELS, assemble
from medsam_lora.models.input_spec import WHITE, InputSpec
from medsam_lora.models.sam import SamModel, build
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train
from medsam_lora.training.held_out import HELD_OUT_SEED, scene_iou, shape_iou
from medsam_lora.training.losses import hard_iou
from medsam_lora.training.scene_batch import normalised

CHECKOUT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model": {"name": "vit_nano", "image_size": 64},
    "prompt": {"jitter_px": 1.0},
    "train": {
        "epochs": 4,
        "slices_per_epoch": 80,
        "batch_size": 2,
        "lr": 4e-4,
        "lr_encoder": 4e-3,
        "validate_every": 4,
    },
}


@pytest.fixture(scope="module")
def nano() -> SamModel:
    return build("vit_nano")


def iou(logits: Tensor, mask: np.ndarray) -> float:
    """Of the mask for one prompt, logits (1, 4, s, s), on the pixels of the picture."""
    whole = torch.nn.functional.interpolate(logits[:, :1], mask.shape, mode="bilinear", align_corners=False)
    return float(hard_iou(whole, torch.from_numpy(mask)[None, None].float())[0, 0])


def test_a_box_outlines_shapes_it_was_not_trained_on(nano: SamModel) -> None:
    found = shape_iou(nano, 64)
    assert found.mean() > 0.75
    assert (found > 0.5).float().mean() > 0.9


def test_points_and_nothing_at_all_are_answered(nano: SamModel) -> None:
    found = scene_iou(nano, 40)
    random = scene_iou(build("vit_nano", "random"), 8)
    assert found["box"] > found["box_floor"] + 0.08
    assert found["point_best"] >= found["point"] > 0.35
    assert found["none"] > 0.3
    assert max(random["box"], random["point_best"], random["none"]) < 0.25


def test_the_prompt_decides_which_object_is_outlined(nano: SamModel) -> None:
    right = []
    for number in range(30):
        scene = make_scene(np.random.default_rng([HELD_OUT_SEED, 2, number]))
        if len(scene.masks) < 2:
            continue
        with torch.no_grad():
            embedding = nano.encode(normalised(torch.from_numpy(scene.image)[None, None]))
            for one, other in ((0, 1), (1, 0)):
                logits, _ = nano.decode(embedding, box(scene, one), [1])
                right.append(iou(logits, scene.masks[one]) > iou(logits, scene.masks[other]))
    assert len(right) > 30
    assert np.mean(right) > 0.93


def box(scene: Scene, number: int) -> Tensor:
    rows, columns = (np.flatnonzero(scene.masks[number].any(axis=axis)) for axis in (1, 0))
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)


def test_pictures_in_another_range_are_outlined_worse(nano: SamModel) -> None:
    right, faint = [], []
    for number in range(32):
        sample = make_sample(np.random.default_rng([HELD_OUT_SEED, 3, number]))
        prompt = torch.from_numpy(sample.box[[1, 0, 3, 2]])[None]
        for scale, found in ((1.0, right), (1 / 255, faint)):
            with torch.no_grad():
                logits, _ = nano(normalised(torch.from_numpy(sample.image[None, :1]) * scale), prompt)
            found.append(iou(logits, sample.mask))
    assert np.mean(right) > np.mean(faint) + 0.15


class Cohort:
    """Phantom cases, prepared."""

    def __init__(self, folder: Path) -> None:
        self.root, self.manifest = folder / "cohort", folder / "manifest.csv"
        make_cohort(self.root, 8, 11, (64, 76, 28))
        build_manifest(self.root, self.manifest, {"train": 0.6, "val": 0.4, "test": 0.0}, 0)
        self.store, outcome = prepare(self.manifest, self.root, folder / "prepared", config())
        assert not outcome.failed

    def dice(self, run: Path, **sections: dict) -> list[float]:
        """Mean Dice of the validation cases before training and after it."""
        train(self.manifest, self.store, run, config(**sections), device="cpu")
        with (run / "log.csv").open(newline="") as handle:
            return [float(row["val_dice"]) for row in csv.DictReader(handle) if row["val_dice"]]


def config(**sections: dict) -> Config:
    return build_config({k: {**SETTINGS.get(k, {}), **sections.get(k, {})} for k in {*SETTINGS, *sections}})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("nano"))


def test_lora_lifts_dice(cohort: Cohort, tmp_path: Path) -> None:
    found = cohort.dice(tmp_path / "lora", method={"name": "lora", "rank": 8})
    assert found[0] > 0.6
    assert found[-1] > found[0] + 0.02


def test_the_wrong_input_range_lowers_dice(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"epochs": 1, "slices_per_epoch": 2}
    right = cohort.dice(tmp_path / "right", train=few)[0]
    # z-scores from -1 to 3 become pixels from 0 to 1, where SAM was trained on 0 to 255.
    monkeypatch.setattr(assemble, "INPUT_RANGES", {"window": InputSpec("window", low=-1.0, high=-1.0 + 4 * WHITE)})
    assert right > cohort.dice(tmp_path / "wrong", train=few)[0] + 0.02


def test_it_says_what_it_is_for(cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(cohort.manifest, cohort.store, tmp_path / "run", config(method={"name": "zero_shot"}), device="cpu")
    assert "not for patients" in caplog.text
    assert "not for patients" in json.loads((tmp_path / "run" / "run.json").read_text())["notice"]
    assert "not for patients" in MODELS["vit_nano"].summary


def test_its_page_is_about_the_weights_that_are_embedded() -> None:
    page = (CHECKOUT / "docs" / "nano.md").read_text()
    assert str(MODELS["vit_nano"].sha256) in page
    assert "not for patients" in page
