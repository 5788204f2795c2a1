"""Grids and the exact way from one to another."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from medsam_lora.geometry import AxisMap, Geometry, axis_map, map_box, place

SHAPE = (4, 5, 6)


def coded_affine(codes: str, spacing: tuple[float, float, float] = (1.0, 2.0, 3.0)) -> np.ndarray:
    """An affine whose array axes grow towards the given directions, with an origin that is not 0."""
    rows = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        row, sign = rows[code]
        affine[row, axis] = sign * spacing[axis]
    affine[:3, 3] = (11.0, -7.0, 3.5)
    return affine


def rotated(affine: np.ndarray, degrees: float = 12.0) -> np.ndarray:
    """The affine turned in the world about an axis that is none of its own."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    angle = np.deg2rad(degrees)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    rotation = np.eye(4)
    rotation[:3, :3] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation @ affine


def reoriented(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """What nibabel makes of an image in another orientation: the oracle."""
    image = nib.Nifti1Image(array, affine)
    here = nib.orientations.io_orientation(affine)
    there = nib.orientations.axcodes2ornt(codes)
    turned = image.as_reoriented(nib.orientations.ornt_transform(here, there))
    return np.asarray(turned.dataobj), turned.affine


@pytest.fixture
def numbered() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "ASL", "SRA", "IPL"])
def test_place_equals_nibabels_reorientation_and_comes_back(numbered, codes, oblique):
    affine = coded_affine("RAS", (1.0, 1.0, 1.0))
    affine = rotated(affine) if oblique else affine
    expected, turned = reoriented(numbered, affine, codes)
    source, target = Geometry(SHAPE, affine), Geometry(expected.shape, turned)
    assert axis_map(source, target) is not None, "a reorientation never needs interpolation"
    np.testing.assert_array_equal(place(numbered, source, target), expected)
    np.testing.assert_array_equal(place(expected, target, source), numbered)


@pytest.mark.parametrize("codes", ["LPS", "PSR"])
def test_a_voxel_keeps_its_world_position(numbered, codes):
    affine = rotated(coded_affine("RAS"))
    expected, turned = reoriented(numbered, affine, codes)
    source, target = Geometry(SHAPE, affine), Geometry(expected.shape, turned)
    moved = place(numbered, source, target)
    for value in (0, 17, 119):
        before = source.world(np.argwhere(numbered == value)[0])
        after = target.world(np.argwhere(moved == value)[0])
        np.testing.assert_allclose(after, before, atol=1e-9)


def test_crop_and_padding_come_back_exactly(numbered):
    grid = Geometry(SHAPE, rotated(coded_affine("LPS")))
    window = grid.cropped((-1, 2, 0), (3, 4, 6))
    assert window.shape == (4, 2, 6)
    cropped = place(numbered, grid, window, fill=-1)
    assert (cropped[0] == -1).all(), "the plane before the volume is padding"
    np.testing.assert_array_equal(cropped[1:], numbered[0:3, 2:4])
    back = place(cropped, window, grid, fill=-5)
    np.testing.assert_array_equal(back[:3, 2:4], numbered[:3, 2:4])
    assert (back[3] == -5).all() and (back[:, :2] == -5).all() and (back[:, 4] == -5).all()


def test_a_grid_without_overlap_gives_fill_only(numbered):
    grid = Geometry(SHAPE, np.eye(4))
    for start in ((9, 0, 0), (-9, 0, 0)):
        elsewhere = grid.cropped(start, (start[0] + 2, 5, 6))
        assert (place(numbered, grid, elsewhere, fill=3) == 3).all()


def test_masks_stay_bool_and_other_grids_are_resampled_by_nearest_voxel():
    mask = np.zeros((4, 4, 4), bool)
    mask[1:3, 1:3, 1:3] = True
    coarse = Geometry((4, 4, 4), np.diag([2.0, 2.0, 2.0, 1.0]))
    fine_affine = np.eye(4)
    fine_affine[:3, 3] = -0.5  # the fine voxels 2i and 2i+1 lie in the coarse voxel i
    fine = Geometry((8, 8, 8), fine_affine)
    assert axis_map(coarse, fine) is None
    resampled = place(mask, coarse, fine)
    assert resampled.dtype == bool
    np.testing.assert_array_equal(resampled, mask.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_place_refuses_an_array_of_another_shape(numbered):
    with pytest.raises(ValueError, match="does not stand on a grid"):
        place(numbered, Geometry((4, 5, 7), np.eye(4)), Geometry(SHAPE, np.eye(4)))


def test_axis_map_by_hand():
    # PSR: axis 0 grows to P (target axis 1, flipped), axis 1 to S (target 2), axis 2 to R (target 0).
    psr = Geometry((5, 6, 4), np.array([[0, 0, 1, 0], [-1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 0, 1.0]]))
    ras = Geometry((4, 5, 6), np.eye(4))
    assert psr.axis_codes == ("P", "S", "R")
    assert axis_map(psr, ras) == AxisMap((1, 2, 0), (-1, 1, 1), (4, 0, 0))


@pytest.mark.parametrize(
    "change",
    [
        np.diag([1.01, 1.0, 1.0, 1.0]),
        np.array([[1, 0, 0, 0.3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    ],
)
def test_axis_map_refuses_other_spacing_and_part_voxel_shifts(change):
    grid = Geometry((40, 5, 6), np.eye(4))
    assert axis_map(grid, Geometry((40, 5, 6), change)) is None


@pytest.mark.parametrize(("codes", "oblique"), itertools.product(["LPS", "PSR", "ASL"], [False, True]))
def test_a_box_maps_to_the_box_of_the_mapped_mask(codes, oblique):
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 2:5, 4:5] = 1
    affine = coded_affine("RAS", (1.0, 1.0, 1.0))
    affine = rotated(affine) if oblique else affine
    moved, turned = reoriented(mask, affine, codes)
    where = np.argwhere(moved)
    expected = (*where.min(axis=0), *(where.max(axis=0) + 1))
    source, target = Geometry(SHAPE, affine), Geometry(moved.shape, turned)
    assert map_box((1, 2, 4, 3, 5, 5), source, target) == expected
    assert map_box(expected, target, source) == (1, 2, 4, 3, 5, 5)


def test_a_box_of_part_voxels_maps_exactly_and_is_not_clipped():
    grid = Geometry((10, 10, 10), np.eye(4))
    crop = grid.cropped((4, 0, 0), (8, 10, 10))
    assert map_box((3.25, 1, 0, 9.5, 2, 1), grid, crop) == (-0.75, 1, 0, 5.5, 2, 1)


def test_units_and_codes():
    grid = Geometry(SHAPE, rotated(coded_affine("LPS", (0.5, 2.0, 5.0)), 3.0))
    np.testing.assert_allclose(grid.spacing_mm, (0.5, 2.0, 5.0))
    assert grid.voxel_volume_ml == pytest.approx(0.005)  # 0.5 * 2 * 5 = 5 cubic mm, 1000 of which are a ml
    assert grid.axis_codes == ("L", "P", "S")
    assert grid.is_orthogonal
    sheared = np.eye(4)
    sheared[0, 1] = 0.2
    assert not Geometry(SHAPE, sheared).is_orthogonal


def test_index_undoes_world():
    grid = Geometry(SHAPE, rotated(coded_affine("PSR")))
    points = np.array([[0, 0, 0], [3.5, -2, 8], [1, 1, 1]])
    np.testing.assert_allclose(grid.index(grid.world(points)), points, atol=1e-9)


def test_json_keeps_every_bit_and_a_slice_is_a_grid_of_depth_one():
    grid = Geometry(SHAPE, rotated(coded_affine("ASL")))
    copy = Geometry.from_json(grid.to_json())
    assert copy.shape == grid.shape and (copy.affine == grid.affine).all()
    plane = grid.at_slice(4)
    assert plane.shape == (4, 5, 1)
    np.testing.assert_allclose(plane.world((1, 2, 0)), grid.world((1, 2, 4)))


def test_matches_counts_displacement_in_voxels():
    grid = Geometry((100, 2, 2), np.diag([2.0, 1.0, 1.0, 1.0]))
    affine = grid.affine.copy()
    affine[0, 0] = 2.0 * (1 + 5e-6)  # the last voxel of 100 is displaced by 99 * 5e-6 = 5e-4 voxels
    assert grid.matches(Geometry(grid.shape, affine))
    affine[0, 0] = 2.0 * (1 + 5e-5)
    assert not grid.matches(Geometry(grid.shape, affine))
    assert grid.displacement_voxels(Geometry(grid.shape, affine)) == pytest.approx(99 * 5e-5)
    assert not grid.matches(Geometry((99, 2, 2), grid.affine))


def test_a_geometry_cannot_be_changed_through_its_affine():
    affine = np.eye(4)
    grid = Geometry(SHAPE, affine)
    affine[0, 3] = 9
    assert grid.affine[0, 3] == 0
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 3] = 1
    with pytest.raises(ValueError, match="three axes"):
        Geometry((2, 3), np.eye(4))
