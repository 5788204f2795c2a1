"""`medsam-lora pretrain` at toy size: its files, its settings, going on after a stop, and two processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from medsam_lora.errors import ConfigError, TrainingError
from medsam_lora.io.files import sha256_of
from medsam_lora.models.sam import build
from medsam_lora.models.weights import load_state
from medsam_lora.stages import pretrain as stage
from medsam_lora.stages.pipeline import PretrainSection
from medsam_lora.stages.pretrain import load_section, pretrain_nano
from medsam_lora.training.held_out import HELD_OUT_SEED

RECIPE = Path(__file__).resolve().parents[2] / "pipelines" / "pretrain_nano.yaml"

TINY = {
    "courses": [{"steps": 2, "sizes": [32], "pictures": [2]}, {"steps": 4, "sizes": [32, 64], "pictures": [2, 2]}],
    "image_size": 64,
    "validate_every": 2,
    "validate_shapes": 4,
}


@pytest.fixture(autouse=True)
def _few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_SCENES_AT_END", 2)
    monkeypatch.setattr(stage, "_SHAPES_AT_END", 4)


def tiny(**changes: object) -> PretrainSection:
    return PretrainSection.model_validate({**TINY, **changes})


def test_what_it_leaves(tmp_path: Path) -> None:
    weights = pretrain_nano(tmp_path, tiny(), "cpu")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["sha256"] == sha256_of(weights)
    assert record["pretrain"]["courses"][1]["sizes"] == [32, 64]
    assert "not for patients" in record["notice"]
    assert set(record["held_out_iou"]) == {"box", "box_floor", "point", "point_best", "none", "shapes_box"}
    assert record["packages"]["torch"] and record["cpu_s"] > 0
    with (tmp_path / "curve.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == [2, 4, 6]
    assert (tmp_path / "curve.svg").read_text().lstrip().startswith("<?xml")
    # A stock SAM state dict: it loads into the model, and is what was trained, rounded to half precision.
    state = load_state(weights)
    assert set(state) == set(build("vit_nano", "random", 64).state_dict())
    assert build("vit_nano", str(weights)).image_size == 256
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


def test_the_same_settings_are_not_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = pretrain_nano(tmp_path, tiny(), "cpu")
    before = sha256_of(weights)

    def refuse(*arguments: object) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_train", refuse)
        assert pretrain_nano(tmp_path, tiny(), "cpu") == weights
        with pytest.raises(AssertionError, match="trained again"):
            pretrain_nano(tmp_path, tiny(seed=1), "cpu")
    pretrain_nano(tmp_path, tiny(seed=1), "cpu")
    assert sha256_of(weights) != before


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain_nano(tmp_path / "whole", tiny(), "cpu")
    real = stage._Run.note

    def stop_after_three(self: stage._Run, step: int, loss: float, iou: float) -> None:
        real(self, step, loss, iou)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage._Run, "note", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            pretrain_nano(tmp_path / "parts", tiny(), "cpu")
    assert not (tmp_path / "parts" / "nano.safetensors").exists()
    parts = pretrain_nano(tmp_path / "parts", tiny(), "cpu")
    assert sha256_of(parts) == sha256_of(whole)
    steps = (tmp_path / "parts" / "curve.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in steps] == ["step", "2", "4", "6"]


def test_memory_that_runs_out_is_one_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage, "pretrain", fail)
    with pytest.raises(TrainingError, match=r"memory ran out while pre-training.*pretrain\.courses") as failure:
        pretrain_nano(tmp_path, tiny(), "cpu")
    assert str(tmp_path) in str(failure.value)


def test_the_ends_of_the_rate_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"steps": 3, "sizes": [32], "pictures": [2]}
    both = [first, {"steps": 2, "sizes": [64], "pictures": [2], "restart": 0.5}]
    alone = load_state(pretrain_nano(tmp_path / "alone", tiny(courses=[first]), "cpu"))
    last = load_state(pretrain_nano(tmp_path / "last", tiny(courses=both), "cpu"))
    averaged = pretrain_nano(tmp_path / "averaged", tiny(courses=both, averaged=2), "cpu")
    mean = load_state(averaged)
    name = "image_encoder.patch_embed.proj.weight"
    assert not torch.equal(alone[name], last[name])
    for name, tensor in mean.items():
        assert torch.allclose(tensor.float(), (alone[name].float() + last[name].float()) / 2, atol=2e-3)
    # The first end is kept over a stop behind it.
    real = stage._Run.note

    def stop_after_four(self: stage._Run, step: int, loss: float, iou: float) -> None:
        real(self, step, loss, iou)
        if step == 4:
            raise KeyboardInterrupt

    section = tiny(courses=both, averaged=2, validate_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(stage._Run, "note", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            pretrain_nano(tmp_path / "parts", section, "cpu")
    assert sha256_of(pretrain_nano(tmp_path / "parts", section, "cpu")) == sha256_of(averaged)


def test_two_processes_share_each_batch(tmp_path: Path) -> None:
    # Two pictures a step with two processes: each has one; the mean of gradients is not bit-equal to one batch's.
    section = tiny(processes=2, courses=[{"steps": 2, "sizes": [32], "pictures": [2]}])
    weights = pretrain_nano(tmp_path / "first", section, "cpu")
    again = pretrain_nano(tmp_path / "second", section, "cpu")
    assert sha256_of(weights) == sha256_of(again)
    start = build("vit_nano", "random", 64, section.seed).state_dict()
    moved = load_state(weights)["image_encoder.patch_embed.proj.weight"].float()
    assert not torch.allclose(moved, start["image_encoder.patch_embed.proj.weight"], atol=1e-6)


def test_the_recipe_and_its_settings() -> None:
    section = load_section(RECIPE, ["pretrain.seed=5", "pretrain.validate_every=7"])
    assert (section.seed, section.validate_every, section.image_size) == (5, 7, 256)
    recipes = sorted(RECIPE.parent.glob("pretrain_*.yaml"))
    assert RECIPE in recipes and all(load_section(path).seed != HELD_OUT_SEED for path in recipes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.step=3", r"pretrain\.step"),
        ("train.lr=1", "unknown key train"),
        ("pretrain.lr=0", r"pretrain\.lr"),
        ("pretrain.courses=[{steps: 1, sizes: [40], pictures: [1]}]", "multiples of 16"),
        ("pretrain.courses=[{steps: 1, sizes: [32, 64], pictures: [1]}]", "equally many"),
        (f"pretrain.seed={HELD_OUT_SEED}", "held-out"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_section(RECIPE, [override])
