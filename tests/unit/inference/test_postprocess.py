"""Clean-up of masks: what is removed and filled by hand-made volumes, and what a fit chooses."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.inference.postprocess import (
    CleanUp,
    ValidationCase,
    clean,
    clean_regions,
    describe,
    fit,
    from_json,
    to_json,
)

VOXEL_ML = 0.002


def block(*box: tuple[int, int], shape: tuple[int, int, int] = (16, 12, 10)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*axis) for axis in box)] = True
    return mask


BIG = block((1, 7), (1, 7), (1, 7))  # 216 voxels, 0.432 ml
SMALL = block((10, 12), (2, 4), (2, 4))  # 8 voxels, 0.016 ml


def test_components_are_removed_below_the_volume_and_kept_at_it() -> None:
    both = BIG | SMALL
    assert np.array_equal(clean(both, VOXEL_ML, CleanUp(min_component_ml=0.016)), both)
    assert np.array_equal(clean(both, VOXEL_ML, CleanUp(min_component_ml=0.0161)), BIG)
    assert not clean(both, VOXEL_ML, CleanUp(min_component_ml=1.0)).any()


def test_components_that_touch_by_a_corner_are_one() -> None:
    corner = block((7, 8), (7, 8), (7, 8))  # one voxel, diagonal to BIG's last
    assert np.array_equal(clean(BIG | corner, VOXEL_ML, CleanUp(min_component_ml=0.01)), BIG | corner)
    apart = block((8, 9), (8, 9), (8, 9))
    assert np.array_equal(clean(BIG | apart, VOXEL_ML, CleanUp(min_component_ml=0.01)), BIG)


def test_only_enclosed_holes_are_filled_and_count_to_their_component() -> None:
    hollow = BIG & ~block((3, 5), (3, 5), (3, 5))
    tunnel = BIG & ~block((3, 5), (3, 5), (0, 10))
    assert np.array_equal(clean(hollow, VOXEL_ML, CleanUp(fill_holes=True)), BIG)
    assert np.array_equal(clean(tunnel, VOXEL_ML, CleanUp(fill_holes=True)), tunnel)
    # 208 voxels without the hole, 216 with it.
    assert not clean(hollow, VOXEL_ML, CleanUp(min_component_ml=0.42)).any()
    assert clean(hollow, VOXEL_ML, CleanUp(min_component_ml=0.42, fill_holes=True)).any()


def test_nothing_asked_is_nothing_done_and_the_input_is_left_alone() -> None:
    mask = BIG | SMALL
    before = mask.copy()
    given = clean(mask, VOXEL_ML, CleanUp())
    assert np.array_equal(given, mask) and given is not mask
    clean(mask, VOXEL_ML, CleanUp(1.0, True))
    assert np.array_equal(mask, before)


def test_regions_stay_within_each_other() -> None:
    core = block((2, 5), (2, 5), (2, 5)) | SMALL
    masks = np.stack([BIG | SMALL, core, core])
    cleaned = clean_regions(masks, VOXEL_ML, ("WT", "TC", "ET"), {"WT": CleanUp(min_component_ml=0.1)})
    assert np.array_equal(cleaned[0], BIG)
    assert not (cleaned[1] & SMALL).any() and cleaned[1].any()
    assert not (cleaned[2] & ~cleaned[1]).any()


def case(prediction: np.ndarray, reference: np.ndarray) -> ValidationCase:
    return ValidationCase("a", prediction[None], reference[None], VOXEL_ML)


def test_the_fit_takes_what_helps_most_and_no_more() -> None:
    # The speck (0.016 ml) is wrong: every limit from 0.03 ml to 0.3 ml removes it alone; the gentlest is taken.
    assert fit([case(BIG | SMALL, BIG)], ["WT"]) == {"WT": CleanUp(min_component_ml=0.03)}
    # The speck is right: removing it would cost.
    assert fit([case(BIG | SMALL, BIG | SMALL)], ["WT"]) == {"WT": CleanUp()}
    hollow = BIG & ~block((3, 5), (3, 5), (3, 5))
    assert fit([case(hollow, BIG)], ["WT"]) == {"WT": CleanUp(fill_holes=True)}


def test_the_fit_weighs_cases_alike() -> None:
    # Removing the speck gains 1 - 432/440 = 0.018 where it is wrong and loses everything where it is all there is.
    cases = [case(BIG | SMALL, BIG), case(SMALL, SMALL)]
    assert fit(cases, ["WT"]) == {"WT": CleanUp()}
    assert fit([*cases[:1] * 60, cases[1]], ["WT"]) == {"WT": CleanUp(min_component_ml=0.03)}
    with pytest.raises(ValueError, match="no validation case"):
        fit([], ["WT"])


def test_it_goes_through_json_and_into_words() -> None:
    how = {"WT": CleanUp(0.1, True), "TC": CleanUp(), "ET": CleanUp(0.03)}
    assert from_json(to_json(how)) == how
    assert describe(how) == ("WT: components under 0.1 ml removed, holes filled; ET: components under 0.03 ml removed")
    assert describe({"WT": CleanUp()}) == "none"
