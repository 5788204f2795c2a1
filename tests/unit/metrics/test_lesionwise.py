"""Lesion-wise scores by hand, and against a slow loop over whole volumes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from medsam_lora.metrics import WORST_DISTANCE_MM
from medsam_lora.metrics.lesionwise import CHALLENGES, Challenge, LesionScores, dilated, lesionwise, merged_lesions
from medsam_lora.metrics.surface import robust_hausdorff, surface_distances, surface_pair

UNIT = (1.0, 1.0, 1.0)
MEN, GLI, MET = (CHALLENGES[f"brats2023-{name}"] for name in ("men", "gli", "met"))
SHAPE = (40, 24, 20)


def boxes(*corners: tuple[tuple[int, int, int], tuple[int, int, int]]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    for low, high in corners:
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


LEFT, RIGHT = ((2, 2, 2), (8, 8, 8)), ((28, 10, 8), (34, 16, 14))  # 216 voxels each
EMPTY = boxes()


def test_dilation_equals_scipy():
    rng = np.random.default_rng(0)
    element = ndimage.generate_binary_structure(3, 2)
    for steps in (1, 2, 3):
        mask = rng.random((9, 8, 7)) < 0.02
        assert np.array_equal(dilated(mask, steps), ndimage.binary_dilation(mask, element, iterations=steps))


def test_parameters_of_the_challenges():
    assert {name: (c.dilation_steps, c.ignored_volume_mm3) for name, c in CHALLENGES.items()} == {
        "brats2023-gli": (3, 50), "brats2023-men": (1, 50), "brats2023-met": (1, 2),
        "brats2023-ssa": (3, 50), "brats2023-ped": (3, 50),
    }  # fmt: skip


def test_a_dilation_that_would_join_parts_is_refused():
    with pytest.raises(ValueError, match="dilation_steps is 4"):
        Challenge(4, 50.0)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        (EMPTY, EMPTY, LesionScores(1.0, 0.0, 0, 0, 0)),
        (EMPTY, boxes(LEFT), LesionScores(0.0, 374.0, 0, 1, 0)),
        (boxes(LEFT), EMPTY, LesionScores(0.0, 374.0, 0, 0, 1)),
        (boxes(LEFT, RIGHT), boxes(LEFT, RIGHT), LesionScores(1.0, 0.0, 2, 0, 0)),
        (boxes(LEFT, RIGHT), boxes(LEFT), LesionScores(0.5, 187.0, 1, 0, 1)),
        (boxes(LEFT), boxes(LEFT, RIGHT), LesionScores(0.5, 187.0, 1, 1, 0)),
        # One found, one missed, two false positives of which one is a single voxel: means over four.
        (
            boxes(LEFT, RIGHT),
            boxes(LEFT, ((2, 18, 15), (3, 19, 16)), ((15, 2, 2), (17, 4, 4))),
            LesionScores(0.25, 3 * 374 / 4, 1, 2, 1),
        ),
    ],
)
def test_by_hand(reference: np.ndarray, prediction: np.ndarray, expected: LesionScores):
    assert lesionwise(reference, prediction, UNIT, MEN) == expected


def test_a_large_lesion_does_not_hide_a_small_one():
    # 18 x 6 x 6 = 648 voxels found, 4 x 4 x 4 = 64 missed: Dice 0.95 over the volume, 0.5 over the lesions.
    reference = boxes(((2, 2, 2), (20, 8, 8)), ((30, 10, 8), (34, 14, 12)))
    found = lesionwise(reference, boxes(((2, 2, 2), (20, 8, 8))), UNIT, MEN)
    assert (found.dice, found.tp, found.fn) == (0.5, 1, 1)


@pytest.mark.parametrize(("voxels", "counted"), [(49, False), (50, False), (51, True)])
@pytest.mark.parametrize("hit", [True, False])
def test_a_lesion_of_50_voxels_does_not_count(voxels: int, counted: bool, hit: bool):
    small = np.zeros(SHAPE, bool)
    first = np.argwhere(boxes(((28, 10, 8), (30, 15, 14))))[:voxels]
    small[tuple(first.T)] = True
    reference = boxes(LEFT) | small
    found = lesionwise(reference, reference if hit else boxes(LEFT), UNIT, MEN)
    assert (found.tp, found.fp, found.fn) == (1 + (counted and hit), 0, int(counted and not hit))
    # What belongs to an ignored lesion is no false positive: the score is that of the other lesion alone.
    assert found.dice == (1.0 if hit or not counted else 0.5)


def test_the_threshold_is_a_volume_and_not_a_number_of_voxels():
    small = boxes(((28, 10, 8), (31, 13, 11)))  # 27 voxels
    assert lesionwise(small, EMPTY, UNIT, MEN).fn == 0
    assert lesionwise(small, EMPTY, (1.0, 1.0, 2.0), MEN).fn == 1  # 54 mm³
    assert lesionwise(small, EMPTY, UNIT, MET).fn == 1
    assert lesionwise(boxes(((28, 10, 8), (30, 11, 9))), EMPTY, UNIT, MET).fn == 0  # 2 mm³
    # A spacing that a rotation left with rounding does not lift 50 voxels over the threshold.
    fifty = boxes(((28, 10, 8), (30, 15, 13)))
    assert lesionwise(fifty, EMPTY, (1.0 + 1e-12, 1.0, 1.0), MEN).fn == 0
    assert lesionwise(fifty, EMPTY, (1.0 + 1e-4, 1.0, 1.0), MEN).fn == 1


@pytest.mark.parametrize(("challenge", "widest"), [(MEN, 2), (GLI, 6)])
def test_near_lesions_are_one(challenge: Challenge, widest: int):
    # Two cubes merge where the gap is no wider than the steps of both dilations together.
    for gap in range(1, 9):
        reference = boxes(((2, 2, 2), (8, 8, 8)), ((8 + gap, 2, 2), (14 + gap, 8, 8)))
        lesions = merged_lesions(reference, challenge.dilation_steps)
        assert lesions.max() == (1 if gap <= widest else 2), gap
        assert np.array_equal(lesions > 0, reference)
        found = lesionwise(reference, boxes(((2, 2, 2), (8, 8, 8))), UNIT, challenge)
        assert (found.tp, found.fn) == ((1, 0) if gap <= widest else (1, 1))


@pytest.mark.parametrize(("gap", "belongs"), [(0, True), (1, False)])
def test_a_component_belongs_where_the_dilated_lesion_touches_it(gap: int, belongs: bool):
    found = lesionwise(boxes(LEFT), boxes(((8 + gap, 2, 2), (14 + gap, 8, 8))), UNIT, MEN)
    assert (found.dice, found.tp, found.fp, found.fn) == ((0.0, 1, 0, 0) if belongs else (0.0, 0, 1, 1))
    assert found.hd95_mm < 10 if belongs else found.hd95_mm == 374.0


def test_a_component_of_two_lesions_is_compared_whole_with_each():
    # Lesions of 216 voxels 4 apart, and one component of 216 + 144 + 216 voxels that covers both.
    first, second = ((2, 2, 2), (8, 8, 8)), ((12, 2, 2), (18, 8, 8))
    found = lesionwise(boxes(first, second), boxes(((2, 2, 2), (18, 8, 8))), UNIT, MEN)
    assert (found.tp, found.fp, found.fn) == (2, 0, 0)
    assert found.dice == pytest.approx(2 * 216 / (216 + 576))


def test_two_components_of_one_lesion_are_compared_together():
    pieces = boxes(((2, 2, 2), (4, 8, 8)), ((6, 2, 2), (8, 8, 8)))  # 72 voxels each
    found = lesionwise(boxes(LEFT), pieces, UNIT, MEN)
    assert (found.tp, found.fp, found.dice) == (1, 0, pytest.approx(2 * 144 / (216 + 144)))


def test_distances_are_in_millimetres():
    shifted = boxes(((2, 2, 3), (8, 8, 9)))
    assert lesionwise(boxes(LEFT), shifted, (1.0, 1.0, 4.0), MEN).hd95_mm == 4.0


def test_surfaces_measured_before_give_the_same_scores():
    one, shifted, both = boxes(LEFT), boxes(((2, 2, 3), (8, 8, 9))), boxes(LEFT, RIGHT)
    for reference, prediction in itertools.product((one, shifted, both), repeat=2):
        pair = surface_pair(reference, prediction, UNIT)
        assert lesionwise(reference, prediction, UNIT, MEN, pair) == lesionwise(reference, prediction, UNIT, MEN)
    # They are used: surfaces of a prediction 3 voxels further give another distance.
    pair = surface_pair(one, boxes(((2, 2, 5), (8, 8, 11))), UNIT)
    assert lesionwise(one, shifted, UNIT, MEN, pair).hd95_mm == 3.0


def slow(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, challenge: Challenge) -> LesionScores:
    """Whole volumes, scipy's own operations, no boxes."""
    touching, element = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)

    def grow(mask: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(mask, element, iterations=challenge.dilation_steps)

    lesions, n_lesions = ndimage.label(grow(reference), touching)
    components, n_components = ndimage.label(prediction, touching)
    used, kept = set(), []
    for number in range(1, n_lesions + 1):
        lesion = (lesions == number) & reference
        near = set(components[grow(lesion)].tolist()) - {0}
        used |= near
        if lesion.sum() * np.prod(spacing) <= challenge.ignored_volume_mm3:
            continue
        found = np.isin(components, sorted(near))
        dice = 2 * (lesion & found).sum() / (lesion.sum() + found.sum())
        hd95 = robust_hausdorff(surface_distances(lesion, found, spacing)) if near else WORST_DISTANCE_MM
        kept.append((dice, hd95, bool(near)))
    fp = n_components - len(used)
    n = len(kept) + fp
    tp = sum(hit for *_, hit in kept)
    if not n:
        return LesionScores(1.0, 0.0, 0, 0, 0)
    mean_dice, mean_hd95 = sum(d for d, *_ in kept) / n, (sum(h for _, h, _ in kept) + WORST_DISTANCE_MM * fp) / n
    return LesionScores(mean_dice, mean_hd95, tp, fp, len(kept) - tp)


@pytest.mark.parametrize(("seed", "name"), itertools.product(range(3), CHALLENGES))
def test_equal_to_whole_volumes(seed: int, name: str):
    rng = np.random.default_rng(seed)
    noise = [ndimage.gaussian_filter(rng.normal(size=(48, 40, 32)), 1.6) for _ in range(2)]
    reference, prediction = noise[0] > 0.2, 0.8 * noise[0] + 0.6 * noise[1] > 0.2
    spacing = (1.0, 1.5, 2.0)
    found = lesionwise(reference, prediction, spacing, CHALLENGES[name])
    expected = slow(reference, prediction, spacing, CHALLENGES[name])
    assert (found.tp, found.fp, found.fn) == (expected.tp, expected.fp, expected.fn)
    assert (found.dice, found.hd95_mm) == pytest.approx((expected.dice, expected.hd95_mm), abs=1e-9)
    assert found.tp + found.fp + found.fn > 2
