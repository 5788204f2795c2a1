"""The MONAI transforms: the same result as prepare_case, and the right affine after every stage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from medsam_lora.errors import DataError
from medsam_lora.prompts.box import boxes_from_mask, to_model
from medsam_lora.prompts.dictionary import BoxesToModeld, BoxPromptd, RandBoxJitterd
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.dictionary import (
    CropPlaned,
    RegionMaskd,
    ResizeLongSided,
    SelectSlicesd,
    geometry_of,
    prepare_transforms,
)
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.slicing import SlicingPlan
from medsam_lora.transforms.stages import STAGES, PreparePlan, prepare_case

PLAN = PreparePlan(crop=CropPlan(size=(8, 6)))


def as_dict(case) -> dict:
    affine = torch.from_numpy(case.geometry.affine.copy())
    return {
        "image": MetaTensor(torch.from_numpy(case.image.copy()), affine=affine),
        "label": MetaTensor(torch.from_numpy(case.label_map.copy())[None], affine=affine),
        "case_id": case.record.case_id,
    }


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        dataclasses.replace(PLAN, scope="slice", voxels="all"),
        dataclasses.replace(PLAN, crop=CropPlan(size=(16, 7))),
        dataclasses.replace(PLAN, crop=CropPlan("none"), slicing=SlicingPlan("random", count=2, empty_share=0.4)),
    ],
    ids=["default", "slice_all", "padded", "random"],
)
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_the_composed_stages_equal_prepare_case(case_on, codes, plan):
    case = case_on(codes)
    expected = prepare_case(case, plan)
    slices = Compose(prepare_transforms(plan))(as_dict(case))
    assert [s["k"] for s in slices] == list(expected.ks)
    z = zscore(expected.image, expected.mean, expected.std, plan.voxels)
    for n, found in enumerate(slices):
        np.testing.assert_allclose(found["image"].numpy()[..., 0], z[n], atol=1e-6)
        np.testing.assert_array_equal(found["label"].numpy()[0, ..., 0], expected.label[n])
        np.testing.assert_array_equal(found["mask"].numpy()[0, ..., 0], expected.label[n] > 0)
        for key in ("image", "label", "mask"):
            assert geometry_of(found[key]).matches(expected.crop.at_slice(expected.ks[n]))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_a_landmark_keeps_its_world_position_through_every_stage(case_on, codes):
    # One voxel brighter than all others, in the tumour of slice 3 at RAS index (5, 4, 3), world (5, 4, 6).
    case = case_on(codes)
    world = np.array([5.0, 4.0, 6.0])
    i, j, k = np.rint(case.geometry.index(world)).astype(int)
    case.image[0, i, j, k] = 9999
    plan = dataclasses.replace(PLAN, slicing=SlicingPlan("max_slice"))
    data = as_dict(case)
    for name, stage in zip(STAGES, prepare_transforms(plan), strict=True):
        result = stage(data)
        (data,) = result if name == "slice" else (result,)
        image = data["image"]
        peak = np.unravel_index(int(image[0].as_tensor().argmax()), image.shape[1:])
        np.testing.assert_allclose(geometry_of(image).world(peak), world, atol=1e-6, err_msg=f"after {name}")
    # Enlarged ninefold, the middle of a voxel is the middle of a pixel.
    framed = ResizeLongSided(("image", "mask"), 72)(data)
    image = framed["image"].numpy()[0, ..., 0]
    assert image.shape == (72, 72) and framed["scale"] == 9
    peak = np.unravel_index(int(image.argmax()), image.shape)
    np.testing.assert_allclose(geometry_of(framed["image"]).world((*peak, 0)), world, atol=1e-6)
    assert geometry_of(framed["mask"]).matches(geometry_of(framed["image"]))


def test_the_frame_of_the_short_side_is_placed_by_its_own_step(case_on):
    # 7 of 9 voxels: 64 * 7 / 9 = 49.8 becomes 50 pixels, each 7 / 50 voxels wide.
    plane = torch.zeros(1, 7, 9, 1)
    tensor = MetaTensor(plane, affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)))
    grid = geometry_of(ResizeLongSided("image", 64)({"image": tensor})["image"])
    assert grid.shape == (64, 64, 1)
    # Pixel edge 50 is voxel edge 7, at 2 * (7 - 0.5) = 13 mm; pixel edge 0 at -1 mm.
    np.testing.assert_allclose(grid.world((49.5, 63.5, 0)), (13.0, 8.5, 0.0), atol=1e-9)
    np.testing.assert_allclose(grid.world((-0.5, -0.5, 0)), (-1.0, -0.5, 0.0), atol=1e-9)


def test_boxes_in_a_compose_end_in_the_model_frame(case_on):
    load = [
        *prepare_transforms(dataclasses.replace(PLAN, slicing=SlicingPlan("max_slice"))),
        BoxPromptd("mask"),
        ResizeLongSided(("image", "mask"), 80),
        BoxesToModeld(),
    ]
    case = case_on("LPS")
    (found,) = Compose(load)(as_dict(case))
    # Tumour X 3:7, Y 3:6 in slice 3; the crop starts at (2, 2); 10 pixels a voxel; x is the second axis.
    assert found["boxes"].tolist() == [[10.0, 10.0, 40.0, 50.0]]
    mask = found["mask"].numpy()[0, ..., 0]
    np.testing.assert_array_equal(found["boxes"], to_model(boxes_from_mask(mask), 1.0))


def test_jitter_is_seeded_stays_within_its_limit_and_leaves_the_global_state():
    data = {"boxes": np.array([[20.0, 20, 60, 60]], np.float32), "boxes_plane": (100, 80)}
    jitterer = RandBoxJitterd(limit_px=20, image_size=1000)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (jitterer.set_random_state(seed=7)(data)["boxes"] for _ in range(2))
    third = jitterer(data)["boxes"]
    np.testing.assert_array_equal(first, second)
    assert (first != third).all() and (first != data["boxes"]).all()
    assert np.abs(first - data["boxes"]).max() <= 2.0  # 20 pixels of 1000 over 100 voxels
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_the_crop_stage_refuses_to_lose_tumour(case_on):
    data = as_dict(case_on("RAS"))
    with pytest.raises(DataError, match="7 of 20"):
        CropPlaned(("image", "label"), CropPlan(size=(4, 6)))(data)
    allowed = CropPlaned(("image", "label"), CropPlan(size=(4, 6), allow_tumour_loss=True))(data)
    assert allowed["image"].shape == (4, 4, 6, 8)


def test_stages_leave_what_they_are_given_untouched(case_on):
    data = as_dict(case_on("RAS"))
    before = {key: data[key].clone() for key in ("image", "label")}
    Compose(prepare_transforms(PLAN))(data)
    RegionMaskd("label", ["ET"])(data)
    SelectSlicesd(("image", "label"), SlicingPlan())(data)
    assert set(data) == {"image", "label", "case_id"}
    for key, tensor in before.items():
        assert torch.equal(data[key].as_tensor(), tensor.as_tensor())
