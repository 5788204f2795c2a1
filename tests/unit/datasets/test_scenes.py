"""Scenes to pre-train on: what is asked for is there, is seen, and is no tumour of the phantom."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.datasets.brain_slices import FLUID, GREY, OUTSIDE, WHITE, brain_slices, draw_structure, place_slice
from medsam_lora.datasets.scenes import MOST_OBJECTS, Scene, make_scene, shapes_scene
from medsam_lora.datasets.shapes import make_sample

SIZE = 96
COUNT = 120


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(np.random.default_rng([7, i]), SIZE) for i in range(COUNT)]


def test_pictures_are_grey_of_the_range_the_model_reads(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (SIZE, SIZE) and scene.image.dtype == np.float32
        assert scene.image.min() >= 0 and scene.image.max() <= 255
        assert scene.image.std() > 1


def test_masks_are_what_is_visible(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.masks.dtype == bool and scene.masks.shape[1:] == (SIZE, SIZE)
        assert scene.masks.any(axis=(1, 2)).all()
        # Objects cover what lies under them, so two that were painted never share a pixel.
        painted = [mask for mask in scene.masks if not (mask & ~scene.painted).any()]
        assert np.sum(painted, axis=0).max() <= 1
        # The last object was painted.
        assert not (scene.masks[-1] & ~scene.painted).any()


def test_there_are_several_objects_and_structures_of_grounds(scenes: list[Scene]) -> None:
    counts = np.array([len(scene.masks) for scene in scenes])
    assert counts.min() == 1 and counts.max() <= MOST_OBJECTS + 2
    assert 2 < counts.mean() < 4
    grounds = sum(bool((mask & ~scene.painted).any()) for scene in scenes for mask in scene.masks)
    assert grounds > 0.1 * counts.sum()


def test_a_scene_is_a_function_of_its_generator() -> None:
    first, again, other = (make_scene(np.random.default_rng([7, seed]), SIZE) for seed in (1, 1, 2))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)


def test_of_a_picture_of_shapes_all_that_can_be_told_is_asked_for() -> None:
    counts = []
    for i in range(60):
        scene, sample = (make(np.random.default_rng([9, i]), SIZE) for make in (shapes_scene, make_sample))
        # The same picture, and its object is the last.
        assert np.array_equal(scene.image, sample.image[0])
        assert np.array_equal(scene.masks[-1], sample.mask)
        assert scene.masks.any(axis=(1, 2)).all()
        assert np.sum(scene.masks, axis=0).max() == 1
        assert not (scene.masks.any(axis=0) & ~scene.painted).any()
        counts.append(len(scene.masks))
    assert min(counts) == 1 and max(counts) >= 5
    assert np.mean(counts) > 2.5


def test_contrast_is_often_faint_and_of_either_sign(scenes: list[Scene]) -> None:
    differences = []
    for scene in scenes:
        mask = scene.masks[-1]
        box = np.zeros_like(mask)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box[max(rows[0] - 4, 0) : rows[-1] + 5, max(columns[0] - 4, 0) : columns[-1] + 5] = True
        around = box & ~mask
        differences.append(scene.image[mask].mean() - scene.image[around].mean())
    spread = np.array(differences)
    assert 0.3 < (spread > 0).mean() < 0.7
    assert (np.abs(spread) < 20).mean() > 0.15
    assert (np.abs(spread) > 40).mean() > 0.15


def test_brains_have_tissue_where_they_have_signal() -> None:
    brains = brain_slices()
    assert brains.images.shape[1] == 4
    assert brains.images.min() == 0 and brains.images.max() <= 1
    outside = brains.tissue == OUTSIDE
    assert not brains.images[outside[:, None].repeat(4, axis=1)].any()
    assert {FLUID, GREY, WHITE} <= set(np.unique(brains.tissue))
    # Fluid is darkest on t1n (0) and brightest on t2w (3): the classes belong to the pictures.
    for modality, order in ((0, (FLUID, GREY, WHITE)), (3, (WHITE, GREY, FLUID))):
        means = [brains.images[:, modality][brains.tissue == kind].mean() for kind in order]
        assert means == sorted(means)
    with pytest.raises(ValueError, match="read-only"):
        brains.images[0] = 1


def test_a_placed_slice_keeps_tissue_and_picture_together() -> None:
    agree = []
    for seed in range(20):
        image, tissue, right = place_slice(np.random.default_rng(seed), brain_slices(), SIZE)
        assert image.shape == tissue.shape == right.shape == (SIZE, SIZE)
        assert not image[tissue == OUTSIDE].max(initial=0) > 0.9
        agree.append(((image > 0.02) & (tissue == OUTSIDE)).mean())
    # Interpolation reaches half a pixel over the border, no further.
    assert np.max(agree) < 0.04


def test_structures_are_of_the_slice() -> None:
    tissue = np.zeros((40, 40), np.uint8)
    tissue[5:35, 5:35] = GREY
    tissue[10:20, 10:30] = WHITE
    tissue[24:32, 24:32] = FLUID
    right = np.zeros((40, 40), bool)
    right[:, 20:] = True
    expected = {
        "brain": tissue != OUTSIDE,
        "right half": (tissue != OUTSIDE) & right,
        "left half": (tissue != OUTSIDE) & ~right,
        "right white": (tissue == WHITE) & right,
        "left white": (tissue == WHITE) & ~right,
    }
    found: set[str] = set()
    for seed in range(60):
        mask = draw_structure(np.random.default_rng(seed), tissue, right)
        if mask is None:
            continue
        names = [name for name, known in expected.items() if np.array_equal(mask, known)]
        # Parts of one tissue are smoothed at their corners.
        names += ["fluid"] if (tissue[mask] == FLUID).mean() > 0.95 else []
        names += ["grey"] if (tissue[mask] == GREY).mean() > 0.95 else []
        assert len(names) == 1
        found |= set(names)
    assert found == {*expected, "fluid", "grey"}
    assert draw_structure(np.random.default_rng(0), np.zeros((20, 20), np.uint8), right[:20, :20]) is None
