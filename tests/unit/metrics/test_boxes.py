"""Boxes around masks: nothing lost, nothing cut, nothing near left apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.distance import cdist

from medsam_lora.metrics.boxes import BLOCK, bounding_box, islands


def test_bounding_box_of_a_turned_view():
    mask = np.zeros((7, 6, 5), bool)
    mask[2:4, 5, 0:3] = True
    assert bounding_box(mask) == (slice(2, 4), slice(5, 6), slice(0, 3))
    assert bounding_box(mask.transpose(2, 0, 1)[:, ::-1]) == (slice(0, 3), slice(3, 5), slice(5, 6))


@pytest.mark.parametrize("seed", range(30))
def test_islands_hold_all_and_are_far_from_one_another(seed: int):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 70, 3).tolist())
    mask = np.zeros(shape, bool)
    for _ in range(rng.integers(1, 12)):
        at = [rng.integers(n) for n in shape]
        mask[tuple(slice(a, a + int(rng.integers(1, 9))) for a in at)] = True
    boxes = islands(mask)
    held = np.zeros(shape, int)
    for box in boxes:
        held[box] += 1
    assert held.max() == 1, "no voxel twice"
    assert held[mask].all(), "every voxel"
    voxels = [np.argwhere(mask[box]) + [s.start for s in box] for box in boxes]
    for i, one in enumerate(voxels):
        assert bounding_box(mask[boxes[i]]) == tuple(slice(0, s.stop - s.start) for s in boxes[i]), (
            "no wider than needed"
        )
        for other in voxels[:i]:
            assert cdist(one, other, "chebyshev").min() > BLOCK
    # As many parts as there are at that distance, or fewer where their boxes meet.
    joined = ndimage.maximum_filter(mask, size=4 * BLOCK + 1)
    assert len(boxes) >= ndimage.label(joined, np.ones((3, 3, 3)))[1]


def test_very_many_parts_are_one_box():
    mask = np.zeros((200, 200, 4), bool)
    mask[::20, ::20] = True
    assert islands(mask) == [(slice(0, 181), slice(0, 181), slice(0, 4))]
    assert len(islands(mask[:100, :100])) == 25
    assert islands(mask & False) == []
