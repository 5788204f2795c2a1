"""Options that are healthy by themselves: no check takes one of them for a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.doctor.diagnosis import diagnose
from medsam_lora.doctor.sources import Given
from medsam_lora.errors import DataError
from medsam_lora.models.fusion import FUSIONS
from medsam_lora.stages.manifest import build_manifest

SETTINGS = ("model.name=vit_nano", "model.image_size=64", "data.modalities=[t1c,t2f]", "method.rank=4")
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantom cases and their manifest."""
    folder = tmp_path_factory.mktemp("options")
    make_cohort(folder / "cohort", 2, 5, (48, 56, 20))
    build_manifest(folder / "cohort", folder / "m.csv", {"train": 1.0, "val": 0.0, "test": 0.0}, 0)
    return folder


def examined(cohort: Path, checks: str, *settings: str) -> Rows:
    given = Given(settings=(*SETTINGS, *settings), manifest=cohort / "m.csv", root=cohort / "cohort")
    return {row["check"]: row for row in diagnose(given, only=checks.split(), device="cpu")}


def statuses(rows: Rows) -> dict[str, str]:
    return {name: row["status"] for name, row in rows.items()}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_is_merged(cohort: Path, fusion: str) -> None:
    row = examined(cohort, "merge", f"fusion.name={fusion}")["merge"]
    assert row["status"] == "ok" and row["numbers"]["difference"] < 1e-5, row


def test_regions_given_by_area_are_merged(cohort: Path) -> None:
    row = examined(cohort, "merge", "method.name=zero_shot", "train.regions=[WT,TC,ET]")["merge"]
    assert (row["status"], row["numbers"]) == ("ok", {"difference": 0, "voxels": 0}), row


def test_a_single_modality_leaves_a_learned_fusion_nothing_to_learn(cohort: Path) -> None:
    rows = examined(cohort, "fusion moved", "data.modalities=[t2f]", "fusion.name=learned")
    assert statuses(rows) == {"fusion": "ok", "moved": "ok"}, rows
    # With several its weights are declared, and must move.
    several = examined(cohort, "moved", "fusion.name=learned")["moved"]
    assert several["status"] == "ok"
    assert several["numbers"]["declared"] == rows["moved"]["numbers"]["declared"] + 1


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_a_threshold_is_no_fault_of_the_frames_or_of_the_base(cohort: Path, threshold: float) -> None:
    rows = examined(cohort, "way_back score base", f"predict.threshold={threshold}")
    assert statuses(rows) == dict.fromkeys(rows, "ok"), rows
    assert f"at the threshold 0.5, not your {threshold:g}" in rows["base"]["measured"]
    # The threshold itself is still the user's where masks are compared with it.
    assert f"the threshold {threshold:g}" in rows["score"]["measured"]


def test_slices_of_small_components_alone_are_not_chosen(cohort: Path) -> None:
    # Of the second case none is left.
    small = ("prompt.boxes=per_component", "prompt.min_component_voxels=50")
    rows = examined(cohort, "labels score box", *small)
    assert statuses(rows) == dict.fromkeys(rows, "ok"), rows
    with pytest.raises(DataError, match="no slice shows tumour that gets a box"):
        examined(cohort, "labels", "prompt.boxes=per_component", "prompt.min_component_voxels=9999")


def test_the_unpadded_grid_is_not_merged(cohort: Path) -> None:
    rows = examined(cohort, "way_back merge", "model.grid=unpadded")
    assert statuses(rows) == {"way_back": "ok", "merge": "skipped"}, rows
    assert "model.grid" in rows["merge"]["meaning"] and not rows["merge"]["remedy"]


def test_a_method_without_boxes_is_predicted_without_boxes(cohort: Path) -> None:
    row = examined(cohort, "predict", "method.name=prompt_tokens", "predict.prompts=none")["predict"]
    assert (row["status"], row["numbers"]["differing"]) == ("ok", 0) and row["numbers"]["voxels"] > 100, row
    assert "whole slices in place of the boxes" in row["measured"]


def test_a_method_that_goes_by_boxes_cannot_be_predicted_without(cohort: Path) -> None:
    row = examined(cohort, "predict", "predict.prompts=none")["predict"]
    assert row["status"] == "FAULT" and "lora goes by prompts" in row["meaning"], row
    assert "Set predict.prompts=boxes" in row["remedy"]


def test_what_trains_nothing_is_not_blamed_for_its_training(cohort: Path) -> None:
    training = ("train.dice_weight=0", "train.schedule=constant", "train.warmup_share=0", "train.clip_norm=null")
    rows = examined(cohort, "settings loss moved", "method.name=zero_shot", "slicing.name=max_slice", *training)
    assert statuses(rows) == {"settings": "ok", "loss": "skipped", "moved": "skipped"}, rows
    assert rows["loss"]["meaning"] == "zero_shot trains nothing" and not rows["loss"]["remedy"]
