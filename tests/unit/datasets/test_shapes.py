"""Shapes to pre-train on: deterministic, box and mask agree, and varied enough to teach more than one rule."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from medsam_lora.datasets.outlines import OUTLINES, REACH, PlaneNoise, largest_part, window
from medsam_lora.datasets.shapes import SIDE_RANGE, ShapeSample, anatomy_slices, box_of, make_sample

COUNT = 240


@pytest.fixture(scope="module")
def samples() -> list[ShapeSample]:
    return [make_sample(np.random.default_rng([0, i])) for i in range(COUNT)]


def test_box_is_that_of_the_mask(samples: list[ShapeSample]) -> None:
    for sample in samples:
        i0, j0, i1, j1 = (int(v) for v in sample.box)
        assert sample.mask.any()
        assert 0 <= i0 < i1 <= 256
        assert 0 <= j0 < j1 <= 256
        # Nothing outside, and something in each row and column at its sides.
        outside = sample.mask.copy()
        outside[i0:i1, j0:j1] = False
        assert not outside.any()
        assert sample.mask[i0].any() and sample.mask[i1 - 1].any()
        assert sample.mask[:, j0].any() and sample.mask[:, j1 - 1].any()


def test_image_is_grey_in_three_channels(samples: list[ShapeSample]) -> None:
    for sample in samples:
        assert sample.image.shape == (3, 256, 256)
        assert sample.image.dtype == np.float32
        assert sample.image.min() >= 0 and sample.image.max() <= 255
        assert np.array_equal(sample.image[0], sample.image[2])
        assert sample.image.std() > 1


def test_filling_the_box_does_not_solve_them(samples: list[ShapeSample]) -> None:
    def floor(sample: ShapeSample) -> float:
        area = float((sample.box[2] - sample.box[0]) * (sample.box[3] - sample.box[1]))
        return float(2 * sample.mask.sum() / (sample.mask.sum() + area))

    floors = [floor(sample) for sample in samples]
    assert 0.6 < np.mean(floors) < 0.8
    assert np.std(floors) > 0.08


def test_sizes_span_the_range_asked_for(samples: list[ShapeSample]) -> None:
    sides = np.array([max(s.box[2] - s.box[0], s.box[3] - s.box[1]) / 256 for s in samples])
    assert sides.max() <= SIDE_RANGE[1] + 0.01
    # Only an occluder makes an object smaller than the least size.
    assert (sides < SIDE_RANGE[0] - 0.01).mean() < 0.03
    assert (sides < 0.2).mean() > 0.15
    assert (sides > 0.4).mean() > 0.15


def test_objects_are_brighter_or_darker_and_visible(samples: list[ShapeSample]) -> None:
    contrast = []
    for sample in samples:
        around = binary_dilation(sample.mask, iterations=4) & ~sample.mask
        contrast.append(float(sample.image[0][sample.mask].mean() - sample.image[0][around].mean()))
    brighter = np.mean(np.array(contrast) > 0)
    assert 0.3 < brighter < 0.7
    assert np.mean(np.abs(contrast) > 8) > 0.8


def test_pictures_differ_in_brightness_and_place(samples: list[ShapeSample]) -> None:
    assert np.std([sample.image.mean() for sample in samples]) > 25
    middles = np.array([(sample.box[:2] + sample.box[2:]) / 2 for sample in samples])
    assert (middles.std(axis=0) > 40).all()


def test_equal_generators_give_equal_samples_and_the_global_state_is_untouched() -> None:
    anatomy_slices()
    np.random.seed(7)  # noqa: NPY002 - the state that must survive
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    for i in range(10):
        first, again = (make_sample(np.random.default_rng([3, i]), 96) for _ in range(2))
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.mask, again.mask)
        assert np.array_equal(first.box, again.box)
        assert not np.array_equal(first.image, make_sample(np.random.default_rng([4, i]), 96).image)
    assert np.array_equal(np.random.random(3), expected)  # noqa: NPY002


@pytest.mark.parametrize("size", [24, 64, 300])
def test_any_size_without_anatomy(size: int) -> None:
    nothing = np.zeros((0, 8, 8), np.float32)
    for i in range(12):
        sample = make_sample(np.random.default_rng([1, i]), size, nothing)
        assert sample.image.shape == (3, size, size)
        assert sample.mask.shape == (size, size)
        assert sample.mask.sum() >= 6


def test_anatomy_is_that_of_brains_without_tumours() -> None:
    slices = anatomy_slices()
    assert len(slices) > 40
    assert slices.min() == 0 and slices.max() == 1
    assert not slices.flags.writeable
    assert (slices[:, 0, 0] == 0).all()
    middle = np.array([image[40:70, 30:60].mean() for image in slices])
    assert (middle > 0.05).mean() > 0.9


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_are_objects_about_the_origin(name: str) -> None:
    grid = np.linspace(-REACH, REACH, 201, dtype=np.float32)
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(12):
        outline = OUTLINES[name](generator)
        inside = outline(grid[:, None], grid[None, :]) > 0
        assert inside.shape == (201, 201)
        box = window(outline)
        if box is None:
            continue
        assert max(abs(v) for v in box) <= REACH
        # Half the frame holds all of it: nothing is cut by the edge that `window` looks at.
        assert not largest_part(inside)[[0, -1]].any() and not largest_part(inside)[:, [0, -1]].any()
        shares.append(inside.sum() / inside.size)
    assert len(shares) >= 10
    assert np.std(shares) > 0.002


def test_ellipse_and_crescent_fill_their_boxes_as_geometry_says() -> None:
    grid = np.linspace(-REACH, REACH, 801, dtype=np.float32)

    class Fixed(np.random.Generator):
        """Gives the middle of every range: an ellipse of ratio 0.675 at a right angle."""

        def uniform(self, low: float = 0.0, high: float = 1.0, size: object = None) -> float:
            return (low + high) / 2

    fixed = Fixed(np.random.PCG64(0))
    inside = OUTLINES["ellipse"](fixed)(grid[:, None], grid[None, :]) > 0
    step = float(grid[1] - grid[0])
    assert inside.sum() * step**2 == pytest.approx(np.pi * 0.675, rel=0.01)
    u0, v0, u1, v1 = box_of(inside) * step - REACH
    assert (u1 - u0, v1 - v0) == (pytest.approx(2 * 0.675, abs=0.03), pytest.approx(2.0, abs=0.03))


def test_noise_weights_sum_to_one_and_follow_a_slope() -> None:
    constant = PlaneNoise(np.full((16, 16), 3.0, np.float32), 0.3)
    u = np.linspace(-2, 2, 33, dtype=np.float32)
    np.testing.assert_allclose(constant.at(u, u[:5]), 3.0, atol=1e-5)
    # A spline through a linear sequence is that line: the value at knot k (offset by one weight) is k + 1.
    ramp = PlaneNoise(np.repeat(np.arange(16, dtype=np.float32)[:, None], 16, axis=1), 1.0)
    at = np.array([2.0, 2.5, 3.0], np.float32)
    np.testing.assert_allclose(ramp.at(at, at)[:, 0], [3.0, 3.5, 4.0], atol=1e-5)


def test_largest_part_by_hand() -> None:
    mask = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0]], bool)
    assert largest_part(mask).astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    empty = np.zeros((2, 2), bool)
    assert not largest_part(empty).any()
