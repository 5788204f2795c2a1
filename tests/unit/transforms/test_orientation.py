"""Turning a volume to R, A, S."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.geometry import place
from medsam_lora.transforms.orientation import orient, oriented


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_orient_equals_nibabels_closest_canonical(case_on, codes):
    case = case_on(codes)
    turned, grid = orient(case.image, case.geometry)
    assert grid.axis_codes == ("R", "A", "S")
    for ours, channel in zip(turned, case.image, strict=True):
        canonical = nib.as_closest_canonical(nib.Nifti1Image(channel, case.geometry.affine))
        np.testing.assert_array_equal(ours, np.asarray(canonical.dataobj))
        np.testing.assert_allclose(grid.affine, canonical.affine, atol=1e-12)
    assert np.shares_memory(turned, case.image), "a view: a volume is not copied to be turned"


def test_a_landmark_of_an_oblique_volume_keeps_its_world_position(case_on):
    case = case_on("PSR")
    angle = np.deg2rad(10)
    tilt = np.eye(4)
    tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    native = type(case.geometry)(case.geometry.shape, tilt @ case.geometry.affine)
    landmark = np.zeros(native.shape, np.uint8)
    landmark[2, 7, 3] = 1
    turned, grid = orient(landmark, native)
    np.testing.assert_allclose(grid.world(np.argwhere(turned)[0]), native.world((2, 7, 3)), atol=1e-9)
    np.testing.assert_array_equal(place(turned, grid, native), landmark)


def test_oriented_is_the_geometry_that_orient_gives(case_on):
    case = case_on("PSR")
    grid = oriented(case.geometry)
    assert grid.shape == (12, 10, 8)
    assert grid.matches(orient(case.image, case.geometry)[1])
