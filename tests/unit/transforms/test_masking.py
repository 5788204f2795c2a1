"""Masks of regions."""

from __future__ import annotations

import numpy as np

from medsam_lora.transforms.masking import region_areas, region_masks

LABEL = np.zeros((3, 3, 2), np.uint8)
LABEL[0, :, 0] = [1, 2, 3]
LABEL[1, 0, 1] = 2


def test_regions_are_stacked_in_the_order_asked_and_the_map_is_kept():
    before = LABEL.copy()
    masks = region_masks(LABEL, ["ET", "TC", "WT"])
    assert masks.dtype == bool and masks.shape == (3, 3, 3, 2)
    assert masks.sum(axis=(1, 2, 3)).tolist() == [1, 2, 4]
    assert masks[0, 0, 2, 0] and masks[1, 0, 0, 0] and masks[2, 1, 0, 1]
    np.testing.assert_array_equal(LABEL, before)


def test_areas_count_voxels_of_the_region_in_each_slice():
    assert region_areas(LABEL, "WT").tolist() == [3, 1]
    assert region_areas(LABEL, "ET").tolist() == [1, 0]
