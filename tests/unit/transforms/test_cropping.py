"""The crop of the plane, on hand-made brains."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.transforms.cropping import (
    BrainBox,
    CropPlan,
    brain_box,
    crop_plane,
    crop_window,
    cropped_geometry,
    refuse_tumour_loss,
    union_box,
    voxels_lost,
)


def brain(shape: tuple[int, int, int], *boxes: tuple[slice, slice, slice]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for box in boxes:
        mask[box] = True
    return mask


# In an image of 20 x 16, centre (10, 8): X from 3 to 15 is -7 to 5, Y from 6 to 14 is -2 to 6.
BRAIN = brain((20, 16, 4), (slice(3, 10), slice(6, 9), slice(0, 1)), (slice(9, 15), slice(8, 14), slice(3, 4)))


def test_the_box_of_a_case_counts_edges_from_the_image_centre():
    box = brain_box(BRAIN)
    assert (box.low, box.high, box.plane) == ((-7.0, -2.0), (5.0, 6.0), (20, 16))


def test_the_union_over_cases_also_of_other_image_sizes():
    # X 1:19 of 19 voxels, centre 9.5: -8.5 to 9.5. Y 8:9 of 16: 0 to 1.
    other = brain_box(brain((19, 16, 1), (slice(1, 19), slice(8, 9), slice(0, 1))))
    box = union_box([brain_box(BRAIN), other], "train")
    assert box == BrainBox((-8.5, -2.0), (9.5, 6.0), (20, 16), "train", 2)


def test_about_the_image_centre_the_size_covers_the_farthest_brain_voxel_on_either_side():
    plan = CropPlan(centre="image", box=brain_box(BRAIN))
    start, stop = crop_window(plan, (20, 16))
    # Farthest are 7 along X and 6 along Y: 14 x 12, from 10 - 7 and 8 - 6.
    assert (start, stop) == ((3, 2), (17, 14))
    assert voxels_lost(BRAIN, start, stop) == 0
    for axis, low, high in ((0, 4, 16), (1, 3, 13)):  # one voxel less on both sides loses brain
        smaller_start, smaller_stop = list(start), list(stop)
        smaller_start[axis], smaller_stop[axis] = low, high
        assert voxels_lost(BRAIN, smaller_start, smaller_stop) > 0


def test_about_the_box_centre_the_crop_is_the_box():
    assert crop_window(CropPlan(centre="box", box=brain_box(BRAIN)), (20, 16)) == ((3, 6), (15, 14))


def test_a_fixed_size_stands_about_either_centre():
    assert crop_window(CropPlan(size=(6, 4)), (20, 16)) == ((7, 6), (13, 10))
    # The centre of the box is (-1, 2) from that of the image.
    assert crop_window(CropPlan(centre="box", size=(6, 4), box=brain_box(BRAIN)), (20, 16)) == ((6, 8), (12, 12))


def test_the_crop_of_the_thesis_on_brats():
    assert crop_window(CropPlan(size=(138, 202)), (240, 240)) == ((51, 19), (189, 221))


def test_a_margin_widens_a_fitted_box_as_far_as_there_is_image():
    box = brain_box(BRAIN)
    assert crop_window(CropPlan(centre="box", margin=2, box=box), (20, 16)) == ((1, 4), (17, 16))
    assert crop_window(CropPlan(centre="image", margin=2, box=box), (20, 16)) == ((1, 0), (19, 16))
    assert crop_window(CropPlan(centre="image", margin=50, box=box), (20, 16)) == ((0, 0), (20, 16))


def test_every_case_gets_the_same_size_whatever_its_image():
    plan = CropPlan(box=brain_box(BRAIN))
    sizes = {
        tuple(b - a for a, b in zip(*crop_window(plan, plane), strict=True))
        for plane in ((20, 16), (21, 17), (8, 40), (13, 13))
    }
    assert sizes == {(14, 12)}


def test_no_crop_and_a_crop_that_is_not_fitted():
    assert crop_window(CropPlan("none"), (20, 16)) == ((0, 0), (20, 16))
    assert not CropPlan("none").needs_fit and not CropPlan(size=(4, 4)).needs_fit
    assert CropPlan().needs_fit and CropPlan(centre="box", size=(4, 4)).needs_fit
    assert not CropPlan(box=brain_box(BRAIN)).needs_fit
    with pytest.raises(ValueError, match="not fitted"):
        crop_window(CropPlan(), (20, 16))


def test_a_size_larger_than_the_image_pads_with_zeros():
    array = np.arange(1, 1 + 2 * 4 * 3 * 2).reshape(2, 4, 3, 2)
    start, stop = crop_window(CropPlan(size=(6, 2)), (4, 3))
    assert (start, stop) == ((-1, 0), (5, 2))
    cropped = crop_plane(array, start, stop)
    assert cropped.shape == (2, 6, 2, 2)
    assert (cropped[:, 0] == 0).all() and (cropped[:, 5] == 0).all()
    np.testing.assert_array_equal(cropped[:, 1:5], array[:, :, 0:2])


def test_a_window_wholly_outside_is_all_zeros():
    array = np.ones((4, 3, 2))
    for start, stop in (((6, 0), (8, 3)), ((-5, 0), (-2, 3))):
        cropped = crop_plane(array, start, stop)
        assert cropped.shape == (stop[0] - start[0], 3, 2) and not cropped.any()


def test_a_landmark_keeps_its_world_position_through_crop_and_padding():
    affine = np.array([[0.8, -0.3, 0, 5], [0.3, 0.8, 0, -9], [0, 0, 2, 1], [0, 0, 0, 1.0]])
    grid = Geometry((20, 16, 4), affine)
    array = np.zeros(grid.shape)
    array[5, 9, 3] = 1
    for size in ((14, 12), (30, 12)):
        start, stop = crop_window(CropPlan(size=size), (20, 16))
        cropped, there = crop_plane(array, start, stop), cropped_geometry(grid, start, stop)
        assert there.shape == cropped.shape == (*size, 4)
        np.testing.assert_allclose(there.world(np.argwhere(cropped)[0]), grid.world((5, 9, 3)), atol=1e-12)


def test_losing_tumour_is_refused_with_the_number_and_a_size_that_works():
    tumour = brain((20, 16, 4), (slice(3, 6), slice(8, 9), slice(1, 3)))  # 6 voxels, X from -7 to -4
    start, stop = crop_window(CropPlan(size=(12, 12)), (20, 16))  # keeps X from 4 to 16: one column of 2 is lost
    with pytest.raises(DataError) as caught:
        refuse_tumour_loss(tumour, start, stop, "c-1")
    error = caught.value
    assert "12 x 12" in error.message and "2 of 6 tumour voxels" in error.message
    assert error.case_id == "c-1" and error.code == "tumour_cropped"
    assert "[14, 12]" in str(error.remedy) and "crop.allow_tumour_loss=true" in str(error.remedy)
    refuse_tumour_loss(tumour, *crop_window(CropPlan(size=(14, 12)), (20, 16)), "c-1")


def test_a_case_without_brain_is_refused():
    with pytest.raises(DataError, match="0 everywhere"):
        brain_box(np.zeros((4, 4, 4), bool))
