"""Masks of whole cases: batches do not matter, slices without boxes stay empty, and every voxel goes home."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.geometry import Geometry
from medsam_lora.inference.predictor import PredictOptions, predict_slices, validate_case
from medsam_lora.inference.volume import to_native
from medsam_lora.labels import MODALITIES
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import CaseRecord, CaseVolumes, PreparedSlices
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.stages import PreparePlan, prepare_case

LPS = np.array([[-1.0, 0, 0, 47], [0, -1.0, 0, 39], [0, 0, 2.0, -3], [0, 0, 0, 1]])
PSR = np.array([[0, 0, 1.0, 3], [-1.0, 0, 0, 20], [0, 1.0, 0, -7], [0, 0, 0, 1]])


def case(affine: np.ndarray, shape: tuple[int, int, int] = (48, 40, 8)) -> CaseVolumes:
    generator = np.random.default_rng(4)
    label = np.zeros(shape, np.uint8)
    label[14:30, 12:26, 2:6] = 2
    label[20, 20, 3] = 3
    image = generator.integers(200, 400, (4, *shape)).astype(np.int16) + 300 * (label > 0).astype(np.int16)
    image[:, :6] = 0
    record = CaseRecord("a", "a", "test", {}, "brats2023", "")
    return CaseVolumes(record, MODALITIES, image, label, Geometry(shape, affine))


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return build_segmenter(
        ModelConfig(name="vit_nano", weights="random", image_size=64),
        MethodConfig(name="zero_shot"),
        FusionConfig(),
        MODALITIES,
        ["WT"],
        0,
        torch.device("cpu"),
    )


def reference_prompts(slices: PreparedSlices) -> dict[int, np.ndarray]:
    return {k: boxes_from_mask(slices.label[n] > 0) for n, k in enumerate(slices.ks)}


@pytest.mark.parametrize("affine", [LPS, np.eye(4), PSR], ids=["LPS", "RAS", "PSR"])
def test_every_voxel_goes_home(affine: np.ndarray) -> None:
    native = case(affine)
    slices = prepare_case(native, PreparePlan(crop=CropPlan(size=(60, 44))), range(8 if affine is not PSR else 40))
    home = to_native(slices.label > 0, slices)
    np.testing.assert_array_equal(home, native.label_map > 0)
    assert home.shape == native.geometry.shape


def test_the_batch_size_does_not_change_a_mask(segmenter: Segmenter) -> None:
    slices = prepare_case(case(LPS), PreparePlan(crop=CropPlan(size=(44, 40))), range(2, 6))
    prompts = reference_prompts(slices)
    one, four = (predict_slices(segmenter, slices, prompts, PredictOptions(n)) for n in (1, 4))
    assert one.dtype == bool and one.shape == (4, 1, 44, 40) and one.any()
    np.testing.assert_array_equal(one, four)


def test_slices_without_boxes_stay_empty_and_the_mode_is_put_back(segmenter: Segmenter) -> None:
    slices = prepare_case(case(LPS), PreparePlan(crop=CropPlan(name="none")), range(8))
    prompts = {k: b for k, b in reference_prompts(slices).items() if k != 3}
    segmenter.train()
    masks = predict_slices(segmenter, slices, prompts, PredictOptions())
    assert segmenter.training
    assert masks.any(axis=(1, 2, 3)).tolist() == [k in prompts and len(prompts[k]) > 0 for k in slices.ks]


def test_a_subset_of_modalities_is_fused_alone(segmenter: Segmenter) -> None:
    whole = case(LPS)
    only = CaseVolumes(whole.record, ("t2f",), whole.image[2:3], whole.label_map, whole.geometry)
    plan = PreparePlan(modalities=("t2f",), crop=CropPlan(name="none"))
    slices = prepare_case(only, plan, [3])
    single = predict_slices(segmenter, slices, reference_prompts(slices), PredictOptions())
    z = (slices.image[0].astype(np.float32) - slices.mean[0, 0]) / slices.std[0, 0]
    z = np.where(slices.image[0] != 0, z, 0)[None].astype(np.float32)
    with torch.inference_mode():
        by_hand = segmenter(torch.from_numpy(z), [reference_prompts(slices)[3]], [2]).logits > 0
    np.testing.assert_array_equal(single, by_hand.numpy())


def test_the_threshold_is_a_probability(segmenter: Segmenter) -> None:
    slices = prepare_case(case(LPS), PreparePlan(crop=CropPlan(name="none")), [3])
    prompts = reference_prompts(slices)
    low, high = (predict_slices(segmenter, slices, prompts, PredictOptions(threshold=t)) for t in (0.01, 0.99))
    assert high.sum() < low.sum() and not (high & ~low).any()


def test_validation_counts_what_the_crop_cut_off(segmenter: Segmenter) -> None:
    whole = prepare_case(case(LPS), PreparePlan(crop=CropPlan(name="none")), range(2, 6))
    score = validate_case(segmenter, whole, "union", 1, PredictOptions())
    masks = predict_slices(segmenter, whole, reference_prompts(whole), PredictOptions())[:, 0]
    reference = whole.label > 0
    expected = 2 * (masks & reference).sum() / (masks.sum() + reference.sum())
    assert score.dice == pytest.approx(expected)
    import dataclasses

    lost = dataclasses.replace(whole, report={"tumour_voxels_lost": 100})
    expected = 2 * (masks & reference).sum() / (masks.sum() + reference.sum() + 100)
    assert validate_case(segmenter, lost, "union", 1, PredictOptions()).dice == pytest.approx(expected)
