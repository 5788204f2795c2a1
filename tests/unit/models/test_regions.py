"""WT, TC and ET from SAM's three masks for ambiguous prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsam_lora import labels
from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig, build_config
from medsam_lora.errors import ConfigError
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import REGION_TOKENS, Segmenter

REGIONS = ["WT", "TC", "ET"]


def segmenter(method: str, regions: list[str] = REGIONS) -> Segmenter:
    return build_segmenter(
        ModelConfig(name="vit_nano", weights="random", image_size=64),
        MethodConfig(name=method, rank=2),
        FusionConfig(),
        labels.MODALITIES,
        regions,
        0,
        torch.device("cpu"),
    ).eval()


def slices(n: int = 6) -> tuple[torch.Tensor, list[np.ndarray]]:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(n, 4, 40, 48, generator=generator)
    return z, [np.array([[4.0 + i, 6, 30, 40]], np.float32) for i in range(n)]


def test_one_region_is_the_mask_of_an_unambiguous_prompt_and_three_are_the_others() -> None:
    assert segmenter("lora", ["WT"]).main_tokens == [0]
    assert segmenter("lora", ["WT"]).token_regions == [0, 0, 0, 0]
    model = segmenter("lora")
    assert model.main_tokens == [REGION_TOKENS[r] for r in REGIONS]
    assert sorted(model.main_tokens) == [1, 2, 3]
    # Every token is trained on the region it predicts, and token 0, which predicts none, on the whole tumour.
    assert [model.token_regions[t] for t in model.main_tokens] == [0, 1, 2]
    assert model.token_regions[0] == 0


def test_zero_shot_gives_its_masks_by_descending_area_in_each_slice() -> None:
    model = segmenter("zero_shot")
    z, boxes = slices()
    with torch.no_grad():
        given = model(z, boxes)
        raw = model(z, boxes, tokens=model.main_tokens)
    areas = (given.logits > 0).sum(dim=(-2, -1))
    assert (areas[:, :-1] >= areas[:, 1:]).all() and areas[:, 0].max() > 0
    for b in range(len(z)):
        order = [next(t for t in range(3) if torch.equal(given.logits[b, r], raw.logits[b, t])) for r in range(3)]
        assert sorted(order) == [0, 1, 2]
        assert torch.equal(given.iou[b], raw.iou[b, order])


def test_a_trained_method_keeps_its_tokens_whatever_their_areas() -> None:
    model = segmenter("decoder_only")
    z, boxes = slices()
    with torch.no_grad():
        assert torch.equal(model(z, boxes).logits, model(z, boxes, tokens=model.main_tokens).logits)
    assert not model.regions_by_area and segmenter("zero_shot").regions_by_area
    assert not segmenter("zero_shot", ["WT"]).regions_by_area


@pytest.mark.parametrize("given", [["TC"], ["WT", "TC"], [], ["WT", "WT", "TC", "ET"]])
def test_regions_are_one_or_all(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.regions"):
        build_config({"train": {"regions": given}})


def test_regions_come_in_their_order() -> None:
    assert build_config({"train": {"regions": ["ET", "WT", "TC"]}}).train.regions == REGIONS
