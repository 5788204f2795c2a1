"""The published weights on a real slice: an encoder that is wrong anywhere cannot beat the filled box."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medsam_lora.io.case import read_case
from medsam_lora.io.discovery import discover
from medsam_lora.labels import region_mask
from medsam_lora.models.input_spec import INPUT_RANGES
from medsam_lora.models.sam import build
from medsam_lora.prompts.box import boxes_from_mask, to_model
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.resizing import model_scale, to_model_frame, to_native_frame
from medsam_lora.transforms.stages import PreparePlan, prepare_case


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.real_data
@pytest.mark.real_weights
def test_zero_shot_beats_the_filled_box(brats_dir: Path, weights_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSAM_LORA_WEIGHTS_DIR", str(weights_dir))
    case = read_case(discover(brats_dir)[0], brats_dir)
    assert case.label_map is not None
    largest = int(region_mask(case.label_map, "WT").sum(axis=(0, 1)).argmax())
    slices = prepare_case(case, PreparePlan(crop=CropPlan("none")), [largest])
    assert slices.label is not None
    reference = region_mask(slices.label[0], "WT")
    shape = (reference.shape[0], reference.shape[1])
    box = boxes_from_mask(reference)
    model = build("vit_t")
    z = torch.from_numpy(zscore(slices.image, slices.mean, slices.std, slices.voxels))
    scale, _ = model_scale(shape, model.image_size)
    with torch.inference_mode():
        pixels = to_model_frame(INPUT_RANGES["window"].to_pixels(z), model.image_size)
        logits, _ = model(pixels, torch.from_numpy(to_model(np.repeat(box, len(pixels), axis=0), scale)))
        fused = to_native_frame(logits[:, :1].mean(dim=0, keepdim=True), model.image_size, shape)
    filled = np.zeros(shape, bool)
    i0, j0, i1, j1 = box[0].astype(int)
    filled[i0:i1, j0:j1] = True
    floor = dice(reference, filled)
    assert 0.6 < floor < 0.9
    assert dice(reference, fused[0, 0].numpy() > 0) > floor + 0.05
