"""Surface distances by hand, by a slow oracle, and their table of areas against MONAI's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from medsam_lora.metrics.boxes import bounding_box
from medsam_lora.metrics.marching_cubes import neighbour_codes, surface_areas
from medsam_lora.metrics.surface import (
    mean_distance,
    robust_hausdorff,
    surface_dice,
    surface_distances,
    surface_elements,
)

SPACINGS = [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0), (0.7, 0.7, 5.0)]


def box(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


@pytest.mark.parametrize("spacing", SPACINGS)
def test_areas_equal_the_table_of_monai(spacing: tuple[float, float, float]):
    utils = pytest.importorskip("monai.metrics.utils")
    table, kernel = utils.create_table_neighbour_code_to_surface_area(spacing)
    # MONAI's table is of float32.
    assert surface_areas(*spacing) == pytest.approx(table.numpy(), rel=1e-6)
    # Bits stand for the same corners.
    assert kernel.numpy().ravel().tolist() == [1 << bit for bit in reversed(range(8))]


def test_areas_by_hand():
    x, y, z = 2.0, 3.0, 5.0
    areas = surface_areas(x, y, z)
    faces = np.array([y * z, x * z, x * y])
    assert areas[0] == areas[255] == 0
    # One corner: the triangle through the middles of its three edges, half the parallelogram of two of its sides.
    a, b, c = (x / 2, 0, 0), (0, y / 2, 0), (0, 0, z / 2)
    triangle = np.linalg.norm(np.cross(np.subtract(b, a), np.subtract(c, a))) / 2
    assert areas[1 << 7] == pytest.approx(triangle) == areas[255 - (1 << 7)]
    # Two corners along z: a rectangle of height z over the diagonal of the middles of the x and y edges.
    assert areas[0b11000000] == pytest.approx(z * np.hypot(x / 2, y / 2))
    # Four corners of a face.
    assert [areas[code] for code in (0b11110000, 0b11001100, 0b10101010)] == pytest.approx(faces)
    # Opposite corners: two triangles.
    assert areas[0b10000001] == pytest.approx(2 * triangle)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_codes_and_elements_equal_a_loop_over_lattice_points(spacing: tuple[float, float, float]):
    mask = np.random.default_rng(1).random((4, 5, 3)) < 0.4
    padded = np.pad(mask, 1)
    codes = np.zeros([n + 1 for n in mask.shape], int)
    for corner in np.ndindex(codes.shape):
        for a, b, c in itertools.product((0, 1), repeat=3):
            if padded[corner[0] + a, corner[1] + b, corner[2] + c]:
                codes[corner] |= 1 << (7 - (4 * a + 2 * b + c))
    assert np.array_equal(neighbour_codes(mask), codes)
    points, areas = surface_elements(mask, spacing)
    found = {tuple(point): area for point, area in zip(points.tolist(), areas, strict=True)}
    table = surface_areas(*spacing)
    assert found == {p: table[codes[p]] for p in np.ndindex(codes.shape) if 0 < codes[p] < 255}


def slow(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float, float]):
    """The definition as the evaluation of BraTS has it: whole volumes, distance transforms, sorted pairs."""
    edges, areas = [], []
    for mask in (reference, prediction):
        codes = neighbour_codes(np.pad(mask, 2))
        edges.append((codes != 0) & (codes != 255))
        areas.append(surface_areas(*spacing)[codes])
    directed = []
    for own, other, area in ((edges[0], edges[1], areas[0]), (edges[1], edges[0], areas[1])):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)
        directed.append(sorted(zip(distance[own], area[own], strict=True)))
    percentiles = []
    for pairs in directed:
        share, total = 0.0, sum(area for _, area in pairs)
        for distance, area in pairs:
            share += area / total
            if share >= 0.95:
                percentiles.append(distance)
                break
    pooled = directed[0] + directed[1]
    total = sum(area for _, area in pooled)
    near = {mm: sum(area for distance, area in pooled if distance <= mm) / total for mm in (1.0, 2.0)}
    return max(percentiles), near[1.0], near[2.0], sum(d * a for d, a in pooled) / total


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_the_slow_definition(seed: int, spacing: tuple[float, float, float]):
    rng = np.random.default_rng(seed)
    noise = [ndimage.gaussian_filter(rng.normal(size=(16, 14, 12)), 1.5) for _ in range(2)]
    reference, prediction = noise[0] > 0.05, noise[0] + 0.5 * noise[1] > 0.06
    distances = surface_distances(reference, prediction, spacing)
    found = (
        robust_hausdorff(distances),
        surface_dice(distances, 1.0),
        surface_dice(distances, 2.0),
        mean_distance(distances),
    )
    assert found == pytest.approx(slow(reference, prediction, spacing), abs=1e-12)
    # Both masks change places: the same numbers.
    back = surface_distances(prediction, reference, spacing)
    assert robust_hausdorff(back) == found[0]
    assert mean_distance(back) == pytest.approx(found[3])


def test_single_voxels_on_an_anisotropic_grid():
    # A voxel has eight lattice points of equal area; the other stands 4 steps of 3 mm further along z, so each of
    # the eight points is 12 mm (near side: 9 mm) from the nearest of the other voxel's.
    one, other = box((3, 3, 9), (1, 1, 1), (2, 2, 2)), box((3, 3, 9), (1, 1, 5), (2, 2, 6))
    distances = surface_distances(one, other, (1.0, 2.0, 3.0))
    assert distances.from_reference.tolist() == [9.0] * 4 + [12.0] * 4
    assert robust_hausdorff(distances) == 12.0
    assert robust_hausdorff(distances, 50.0) == 9.0
    assert mean_distance(distances) == pytest.approx(10.5)
    assert surface_dice(distances, 8.9) == 0.0
    assert surface_dice(distances, 9.0) == pytest.approx(0.5)
    assert surface_dice(distances, 12.0) == pytest.approx(1.0)


@pytest.mark.parametrize(("axis", "expected"), [(0, 1.0), (1, 2.0), (2, 5.0)])
def test_a_shift_by_one_voxel_is_its_spacing(axis: int, expected: float):
    mask = box((16, 16, 16), (4, 4, 4), (12, 12, 12))
    distances = surface_distances(mask, np.roll(mask, 1, axis), (1.0, 2.0, 5.0))
    assert robust_hausdorff(distances) == expected


def test_percentiles_are_over_area_and_not_over_elements():
    # A plate of 20 x 20 voxels with a hair on top: on the plate every distance is 0. Rough pieces are many
    # lattice points with little area; a percentile over points would be larger.
    plate = box((24, 24, 30), (2, 2, 2), (22, 22, 3))
    hairy = plate | box((24, 24, 30), (10, 10, 3), (11, 11, 25))
    distances = surface_distances(hairy, plate, (1.0, 1.0, 1.0))
    over_area = robust_hausdorff(distances)
    over_points = np.sort(distances.from_reference)[int(0.95 * len(distances.from_reference))]
    assert 0 < over_area < over_points


def test_masks_at_the_border_of_the_grid_are_closed():
    shape = (6, 6, 6)
    whole = np.ones(shape, bool)
    inside = np.pad(whole, 2)
    assert surface_elements(whole, (1.0, 1.0, 1.0))[1].sum() == pytest.approx(
        surface_elements(inside, (1.0, 1.0, 1.0))[1].sum()
    )
    smaller = box(shape, (1, 1, 1), (5, 5, 5))
    # Elements of the faces (77 % of the area) are 1 mm off, those of the edges sqrt 2, of the corners sqrt 3.
    assert robust_hausdorff(surface_distances(whole, smaller, (1.0, 1.0, 1.0))) == np.sqrt(2)


def test_an_empty_mask_is_infinitely_far():
    mask, empty = box((4, 4, 4), (1, 1, 1), (3, 3, 3)), np.zeros((4, 4, 4), bool)
    for pair in ((mask, empty), (empty, mask)):
        distances = surface_distances(*pair, (1.0, 1.0, 1.0))
        assert robust_hausdorff(distances) == float("inf")
        assert surface_dice(distances, 1e9) == 0.0
    assert bounding_box(empty) is None


def test_views_and_orders_of_memory_do_not_matter():
    rng = np.random.default_rng(5)
    a, b = rng.random((2, 9, 8, 7)) < 0.2
    expected = robust_hausdorff(surface_distances(a, b, (1.0, 2.0, 3.0)))
    fortran = surface_distances(np.asfortranarray(a), b.T.copy().T, (1.0, 2.0, 3.0))
    assert robust_hausdorff(fortran) == expected
    turned = surface_distances(a.transpose(2, 1, 0), b.transpose(2, 1, 0), (3.0, 2.0, 1.0))
    assert robust_hausdorff(turned) == pytest.approx(expected)
