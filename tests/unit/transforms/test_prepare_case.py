"""A whole case through the stages."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from medsam_lora.errors import DataError
from medsam_lora.geometry import place
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.slicing import SlicingPlan
from medsam_lora.transforms.stages import PreparePlan, case_brain_box, crop_geometry, prepare_case

PLAN = PreparePlan(crop=CropPlan(size=(8, 6)))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_the_same_patient_in_any_orientation_gives_the_same_slices(case_on, codes):
    reference, slices = prepare_case(case_on("RAS"), PLAN), prepare_case(case_on(codes), PLAN)
    assert slices.ks == (2, 3, 4)
    np.testing.assert_array_equal(slices.image, reference.image)
    np.testing.assert_array_equal(slices.label, reference.label)
    np.testing.assert_allclose(slices.mean, reference.mean, rtol=1e-12)
    assert slices.crop.matches(reference.crop)
    assert slices.native.axis_codes == tuple(codes)


def test_slices_hold_the_raw_voxels_of_their_place(ras_case):
    slices = prepare_case(ras_case, PLAN)
    # 8 x 6 about the centre of 12 x 10: X 2:10, Y 2:8.
    assert slices.image.dtype == np.int16 and slices.image.flags.c_contiguous
    for n, k in enumerate((2, 3, 4)):
        np.testing.assert_array_equal(slices.image[n], ras_case.image[:, 2:10, 2:8, k])
        np.testing.assert_array_equal(slices.label[n], ras_case.label_map[2:10, 2:8, k])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_the_labels_of_all_slices_come_home_exactly(case_on, codes):
    case = case_on(codes)
    slices = prepare_case(case, PLAN)
    volume = np.zeros(slices.crop.shape, np.uint8)
    volume[:, :, list(slices.ks)] = np.moveaxis(slices.label, 0, -1)
    np.testing.assert_array_equal(place(volume, slices.crop, slices.native), case.label_map)


def test_statistics_are_those_of_the_whole_volume_before_the_crop(ras_case):
    slices = prepare_case(ras_case, PLAN)
    values = ras_case.image[1][ras_case.image[1] != 0].astype(np.float64)
    assert slices.mean[0, 1] == pytest.approx(values.mean()) and slices.std[2, 1] == pytest.approx(values.std())
    per_slice = prepare_case(ras_case, dataclasses.replace(PLAN, scope="slice"))
    shown = ras_case.image[1, :, :, 3].astype(np.float64)
    assert per_slice.mean[1, 1] == pytest.approx(shown[shown != 0].mean())
    normal = zscore(slices.image, slices.mean, slices.std, slices.voxels)
    assert normal[0, 1, 3, 3] == pytest.approx((ras_case.image[1, 5, 5, 2] - values.mean()) / values.std(), rel=1e-5)


def test_the_report_counts_over_the_whole_volume(ras_case):
    # Brain 7 x 8 x 6; the crop keeps X 2:9 (all 7) and Y 2:8 of 1:9 (6 of 8).
    assert dict(prepare_case(ras_case, PLAN).report) == {
        "brain_voxels": 336,
        "brain_voxels_lost": 84,
        "tumour_voxels": 20,
        "tumour_voxels_lost": 0,
    }


def test_tumour_outside_the_crop_is_refused_unless_allowed(ras_case):
    plan = dataclasses.replace(PLAN, crop=CropPlan(size=(4, 6)))  # keeps X 4:8; tumour at X 3 in every slice
    with pytest.raises(DataError, match="cuts off 7 of 20 tumour voxels") as caught:
        prepare_case(ras_case, plan)
    assert caught.value.case_id == "a"
    # The refusal counts slices that are not stored as well.
    only_one = dataclasses.replace(plan, slicing=SlicingPlan("max_slice"))
    with pytest.raises(DataError, match="7 of 20"):
        prepare_case(ras_case, only_one)
    allowed = dataclasses.replace(plan, crop=CropPlan(size=(4, 6), allow_tumour_loss=True))
    assert prepare_case(ras_case, allowed).report["tumour_voxels_lost"] == 7
    # Whether a case can be predicted must not depend on its reference.
    assert prepare_case(ras_case, plan, [3]).report["tumour_voxels_lost"] == 7


def test_training_is_sliced_by_the_plan_and_evaluation_never(case_on):
    plan = dataclasses.replace(PLAN, slicing=SlicingPlan("max_slice"))
    assert prepare_case(case_on(split="train"), plan).ks == (3,)
    for split in ("val", "test", ""):
        assert prepare_case(case_on(split=split), plan).ks == (2, 3, 4)


def test_a_case_without_reference_keeps_its_brain_slices_but_cannot_train(case_on):
    slices = prepare_case(case_on(split="test", with_label=False), PLAN)
    assert slices.ks == (1, 2, 3, 4, 5, 6) and slices.label is None
    assert slices.report["tumour_voxels"] is None and slices.report["tumour_voxels_lost"] is None
    with pytest.raises(DataError, match="no reference"):
        prepare_case(case_on(split="train", with_label=False), PLAN)


def test_slices_asked_for_replace_the_slicing(ras_case):
    slices = prepare_case(ras_case, PLAN, [6, 0, 3, 3])
    assert slices.ks == (0, 3, 6)
    np.testing.assert_array_equal(slices.image[2], ras_case.image[:, 2:10, 2:8, 6])
    none = prepare_case(ras_case, PLAN, [])
    assert none.image.shape == (0, 4, 8, 6) and none.mean.shape == (0, 4) and none.label.shape == (0, 8, 6)
    for bad in ([8], [-1, 2]):
        with pytest.raises(DataError, match="not all among the 8"):
            prepare_case(ras_case, PLAN, bad)


def test_padding_beyond_the_image_is_zero_and_comes_home(ras_case):
    slices = prepare_case(ras_case, dataclasses.replace(PLAN, crop=CropPlan(size=(16, 6))))
    assert slices.crop.shape == (16, 6, 8)
    assert not slices.image[:, :, :2].any() and not slices.image[:, :, 14:].any()
    np.testing.assert_array_equal(slices.image[1, :, 2:14], ras_case.image[:, :, 2:8, 3])
    np.testing.assert_allclose(slices.crop.world((0, 0, 3)), ras_case.geometry.world((-2, 2, 3)))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_the_brain_box_is_that_of_the_oriented_plane(case_on, codes):
    box = case_brain_box(case_on(codes))
    assert (box.low, box.high, box.plane) == ((-4.0, -4.0), (3.0, 4.0), (12, 10))


def test_the_crop_grid_is_known_from_the_geometry_alone(case_on):
    case = case_on("PSR")
    assert crop_geometry(case.geometry, PLAN).matches(prepare_case(case, PLAN).crop)


def test_a_plan_goes_through_json_and_its_fingerprint_follows_every_setting(ras_case):
    box = case_brain_box(ras_case)
    plan = PreparePlan(slicing=SlicingPlan("random", seed=4), crop=CropPlan(margin=1, box=box), scope="slice")
    copy = PreparePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert copy == plan and copy.fingerprint() == plan.fingerprint()
    changed = [
        dataclasses.replace(plan, modalities=("t1n",)),
        dataclasses.replace(plan, region="TC"),
        dataclasses.replace(plan, voxels="all"),
        dataclasses.replace(plan, scope="volume"),
        dataclasses.replace(plan, nonfinite="zero"),
        dataclasses.replace(plan, training_cases="x"),
        dataclasses.replace(plan, slicing=SlicingPlan("random", seed=5)),
        dataclasses.replace(plan, crop=CropPlan(margin=2, box=box)),
        dataclasses.replace(plan, crop=CropPlan(margin=1, box=dataclasses.replace(box, high=(9.0, 4.0)))),
    ]
    prints = {p.fingerprint() for p in [plan, *changed]}
    assert len(prints) == 10 and all(len(p) == 12 for p in prints)


def test_only_the_default_slicing_is_the_same_for_training_and_evaluation():
    assert not PreparePlan(slicing=SlicingPlan("full", step=7, count=3, seed=9)).slices_training_apart
    for slicing in (SlicingPlan("max_slice"), SlicingPlan(tumour_only=False), SlicingPlan(empty_share=0.1)):
        assert PreparePlan(slicing=slicing).slices_training_apart
