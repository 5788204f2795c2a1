"""Overlap metrics against values counted by hand and a voxel-by-voxel oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medsam_lora.geometry import Geometry
from medsam_lora.metrics import METRICS, WORST_DISTANCE_MM, Metric, overlap, score, worst_scores
from medsam_lora.metrics.overlap import Comparison, Counts, count


def grid(*shape: int) -> Geometry:
    return Geometry(shape, np.eye(4))


def cube(shape: tuple[int, int, int], low: tuple[int, int, int], high: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = True
    return mask


def test_values_by_hand():
    # Reference 4x4x2 = 32 voxels, prediction 4x2x2 = 16 of which 2x2x2 = 8 lie in the reference.
    shape = (10, 10, 4)
    pair = Comparison(cube(shape, (0, 0, 0), (4, 4, 2)), cube(shape, (2, 1, 0), (6, 3, 2)), grid(*shape))
    assert pair.counts == Counts(tp=8, fp=8, fn=24, tn=400 - 40)
    assert score(pair) == {"dice": 16 / 48, "iou": 8 / 40, "sensitivity": 8 / 32, "precision": 8 / 16}


def test_counts_equal_a_loop_over_voxels():
    rng = np.random.default_rng(3)
    for density in (0.0, 0.1, 0.5, 1.0):
        reference = rng.random((5, 4, 3)) < density
        prediction = rng.random((5, 4, 3)) < 0.4
        tally = dict.fromkeys(itertools.product((False, True), repeat=2), 0)
        for voxel in np.ndindex(reference.shape):
            tally[bool(reference[voxel]), bool(prediction[voxel])] += 1
        found = count(reference, prediction)
        assert (found.tp, found.fp, found.fn, found.tn) == (
            tally[True, True],
            tally[False, True],
            tally[True, False],
            tally[False, False],
        )


def test_dice_is_of_the_volume_and_not_the_mean_of_slices():
    # Slice 0: 100 of 100 voxels right; slice 1: 1 reference voxel, missed. Mean of slices 0.5, volume 200 / 201.
    reference, prediction = np.zeros((10, 10, 2), bool), np.zeros((10, 10, 2), bool)
    reference[..., 0] = prediction[..., 0] = True
    reference[0, 0, 1] = True
    assert score(Comparison(reference, prediction, grid(10, 10, 2)))["dice"] == 200 / 201


def test_dice_and_iou_are_tied():
    rng = np.random.default_rng(4)
    for _ in range(20):
        pair = Comparison(rng.random((4, 4, 4)) < 0.5, rng.random((4, 4, 4)) < 0.5, grid(4, 4, 4))
        assert overlap.dice(pair) == pytest.approx(2 * overlap.iou(pair) / (1 + overlap.iou(pair)))


@pytest.mark.parametrize(("reference_voxels", "prediction_voxels", "expected"), [(0, 0, 1.0), (0, 3, 0.0), (3, 0, 0.0)])
def test_empty_masks(reference_voxels: int, prediction_voxels: int, expected: float):
    reference, prediction = np.zeros((2, 2, 2), bool), np.zeros((2, 2, 2), bool)
    reference.flat[:reference_voxels] = True
    prediction.flat[:prediction_voxels] = True
    scores = score(Comparison(reference, prediction, grid(2, 2, 2)))
    assert scores == dict.fromkeys(["dice", "iou", "sensitivity", "precision"], expected)


def test_empty_masks_of_a_distance_are_0_and_374_mm():
    def never(_: Comparison) -> float:
        raise AssertionError("a metric must not be computed where a mask is empty")

    table = {"some_distance_mm": Metric(never, both_empty=0.0, worst=WORST_DISTANCE_MM)}
    empty, full = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    assert score(Comparison(empty, empty, grid(2, 2, 2)), table) == {"some_distance_mm": 0.0}
    assert score(Comparison(empty, full, grid(2, 2, 2)), table) == {"some_distance_mm": 374.0}
    assert score(Comparison(full, empty, grid(2, 2, 2)), table) == {"some_distance_mm": 374.0}
    assert worst_scores(table) == {"some_distance_mm": 374.0}
    assert np.ceil(np.linalg.norm([240, 240, 155])) == WORST_DISTANCE_MM


def test_every_metric_has_bounds_that_its_values_respect():
    rng = np.random.default_rng(5)
    for _ in range(10):
        pair = Comparison(rng.random((4, 4, 4)) < 0.3, rng.random((4, 4, 4)) < 0.3, grid(4, 4, 4))
        same = Comparison(pair.reference, pair.reference, pair.geometry)
        for metric in METRICS.values():
            low, high = sorted((metric.worst, metric.both_empty))
            assert low <= metric.compute(pair) <= high
            # The best value is that of equal masks.
            assert metric.compute(same) == metric.both_empty


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_masks_that_are_not_boolean_are_refused(dtype: type):
    good, bad = np.ones((2, 2, 2), bool), np.ones((2, 2, 2), dtype)
    with pytest.raises(TypeError, match="prediction must be a mask of bool"):
        Comparison(good, bad, grid(2, 2, 2))
    with pytest.raises(TypeError, match="reference must be a mask of bool"):
        Comparison(bad, good, grid(2, 2, 2))


def test_four_perfect_masks_added_up_do_not_score():
    # A sum of masks would give a "Dice" of 1.6 by products; it is refused instead.
    mask = cube((4, 4, 4), (1, 1, 1), (3, 3, 3))
    total = sum(mask.astype(np.int64) for _ in range(4))
    assert 2 * (mask * total).sum() / (mask.sum() + total.sum()) == pytest.approx(1.6)
    with pytest.raises(TypeError):
        Comparison(mask, total, grid(4, 4, 4))


def test_masks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Comparison(np.ones((2, 2, 2), bool), np.ones((2, 2, 1), bool), grid(2, 2, 2))
    with pytest.raises(ValueError, match="shape"):
        Comparison(np.ones((2, 1, 2), bool), np.ones((2, 2, 2), bool), grid(2, 2, 2))
