"""Training on WT, TC and ET: every mask token learns its own region."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import ndimage

from medsam_lora import labels
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig, TrainConfig
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import REGION_TOKENS, Segmenter
from medsam_lora.records import PreparedSlices
from medsam_lora.training import loop
from medsam_lora.training.dataset import PromptOptions, SliceDataset

REGIONS = ["WT", "TC", "ET"]


def segmenter(method: str) -> Segmenter:
    return build_segmenter(
        ModelConfig(name="vit_nano", weights="random", image_size=64),
        MethodConfig(name=method, rank=2),
        FusionConfig(),
        labels.MODALITIES,
        REGIONS,
        0,
        torch.device("cpu"),
    ).eval()


@pytest.fixture
def nested_cases(training_cases: list[PreparedSlices]) -> list[PreparedSlices]:
    """The discs with a core and, within it, an enhancing part, each brighter than what lies around it."""
    cases = []
    for case in training_cases:
        assert case.label is not None
        label, image = case.label.copy(), case.image.copy()
        for k in range(len(label)):
            whole = label[k] > 0
            for value, depth in ((labels.NETC, 1), (labels.ET, 2)):
                part = ndimage.binary_erosion(whole, iterations=depth)
                label[k][part] = value
                image[k][:, part] += 300
        cases.append(replace(case, label=label, image=image))
    return cases


def test_every_token_is_trained_on_the_reference_of_its_region(
    nested_cases: list[PreparedSlices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = segmenter("decoder_only")
    dataset = SliceDataset(nested_cases, model.regions, PromptOptions(), 64)
    seen: list[tuple[torch.Tensor, list[int]]] = []
    loss = loop.segmentation_loss

    def note(logits: torch.Tensor, iou: torch.Tensor, target: torch.Tensor, main: list[int], weights: Any) -> Any:
        seen.append((target.clone(), main))
        return loss(logits, iou, target, main, weights)

    monkeypatch.setattr(loop, "segmentation_loss", note)
    options = TrainConfig(epochs=1, batch_size=len(dataset), select="last", regions=REGIONS)
    loop.Trainer(model, dataset, [], options, tmp_path / "s.pt", "x").fit()
    (target, main), *_ = seen
    whole, core, enhancing = (target[:, REGION_TOKENS[r]] for r in REGIONS)
    assert main == [REGION_TOKENS[r] for r in REGIONS] and torch.equal(target[:, 0], whole)
    label = [torch.from_numpy(dataset.sample(i).masks) for i in range(len(dataset))]
    for r, mask in enumerate((whole, core, enhancing)):
        assert mask.sum() == sum(m[r].sum() for m in label) > 0
    assert core.sum() < whole.sum() and enhancing.sum() < core.sum()


def test_the_decoder_learns_to_tell_regions_apart(nested_cases: list[PreparedSlices], tmp_path: Path) -> None:
    model = segmenter("full")
    dataset = SliceDataset(nested_cases, model.regions, PromptOptions(), 64)
    options = TrainConfig(epochs=12, batch_size=2, lr=1e-3, select="last", regions=REGIONS)
    rows = loop.Trainer(model, dataset, [], options, tmp_path / "s.pt", "x").fit()
    assert rows[-1]["train_dice"] > rows[1]["train_dice"] + 0.1
    batch = dataset.batch(range(len(dataset)))
    with torch.no_grad():
        masks = model.eval()(batch.z, batch.boxes).logits > 0
    areas = masks.sum(dim=(0, 2, 3))
    assert areas[0] > areas[1] > 0
