"""Voxels in the page: the window, the budget, and where a voxel stands after all of it."""

from __future__ import annotations

import base64
import gzip

import numpy as np
import pytest

from medsam_lora.geometry import Geometry
from medsam_lora.report.cases import ShownCase
from medsam_lora.report.volumes import Packer, pack, shrink_image, shrink_labels, steps_for, windowed

AFFINE = np.array([[2.0, 0, 0, -30], [0, 1.5, 0, 10], [0, 0, 3.0, 5], [0, 0, 0, 1]])


def case(shape: tuple[int, int, int] = (12, 11, 10), seed: int = 0) -> ShownCase:
    generator = np.random.default_rng(seed)
    image = generator.integers(1, 900, (2, *shape)).astype(np.int16)
    reference = np.zeros(shape, np.uint8)
    reference[6:8, 4:6, 2:4] = 1
    return ShownCase("c", ("t1n", "t2f"), image, reference, {"lora": reference * 0}, Geometry(shape, AFFINE))


def unpack(text: str, shape: list[int]) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def test_native_voxels_come_back_as_they_were() -> None:
    shown = case()
    packed = pack(shown, 3, (1, 1, 1))
    assert packed.about["modalities"] == {"t1n": "v3-t1n", "t2f": "v3-t2f"}
    assert np.array_equal(unpack(packed.blobs["v3-reference"], packed.about["shape"]), shown.reference)
    assert np.array_equal(unpack(packed.blobs["v3-t2f"], packed.about["shape"]), windowed(shown.image[1]))
    assert packed.about["focus"] == [6, 4, 2]


@pytest.mark.parametrize("steps", [(1, 1, 2), (2, 2, 2), (3, 4, 3)])
def test_a_voxel_of_the_page_stands_in_the_middle_of_its_block(steps: tuple[int, int, int]) -> None:
    about = pack(case(), 0, steps).about
    affine = np.array([*about["affine"], [0, 0, 0, 1]])
    block = [np.arange(step) for step in steps]
    members = np.stack(np.meshgrid(*block), axis=-1).reshape(-1, 3)
    assert (affine @ [0, 0, 0, 1])[:3] == pytest.approx(Geometry((1, 1, 1), AFFINE).world(members).mean(axis=0))
    assert about["spacing"] == [s * step for s, step in zip((2.0, 1.5, 3.0), steps, strict=True)]


def test_blocks_are_means_of_what_they_hold() -> None:
    image = np.random.default_rng(1).integers(0, 256, (5, 4, 7)).astype(np.uint8)
    got = shrink_image(image, (2, 3, 4))
    for i, j, k in np.ndindex(*got.shape):
        block = image[2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 4 * k : 4 * k + 4]
        assert abs(float(got[i, j, k]) - block.mean()) <= 0.5001
    assert got.shape == shrink_labels(image, (2, 3, 4)).shape == (3, 2, 2)


def test_long_voxels_are_left_long() -> None:
    thick = Geometry((8, 8, 8), np.diag([1.0, 1.0, 5.0, 1.0]))
    assert [steps_for(thick, s) for s in ((1, 1), (1, 2), (2, 2), (6, 6))] == [(1, 1, 1)] * 2 + [(2, 2, 1), (6, 6, 1)]


def test_the_finest_that_fits_the_budget_is_kept_for_all_cases() -> None:
    native = sum(pack(case(seed=seed), seed, (1, 1, 1)).size for seed in (0, 1))
    steps = []
    for budget in (native, native - 1, native // 3, 10):
        packer = Packer(budget)
        for seed in (0, 1):
            packer.add(case(seed=seed))
        cases = packer.finest()
        if cases is None:
            steps.append(None)
            continue
        assert sum(c.size for c in cases) <= budget and len(cases) == 2
        assert len({tuple(c.about["steps"]) for c in cases}) == 1
        steps.append(cases[0].about["steps"])
    # The smallest spacing is 1.5 mm: two of it across the slices is one voxel of 3 mm, so that (1, 2) changes nothing.
    assert steps[0] == [1, 1, 1] and steps[1] == [1, 2, 1] and steps[3] is None
    assert steps[2] is not None and np.prod(steps[2]) > 2


def test_background_stays_apart_from_dark_tissue() -> None:
    grey = windowed(np.array([[[0, 1, 500, 1000]]], np.int16))
    assert grey[0, 0, 0] == 0 and grey[0, 0, 1] == 1 and grey[0, 0, 3] == 255
    assert windowed(np.zeros((2, 2, 2))).max() == 0
