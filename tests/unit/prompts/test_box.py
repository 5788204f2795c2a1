"""Boxes in a slice: by hand, against a slow oracle, and through SAM's own prompt encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsam_lora.config import PromptConfig
from medsam_lora.prompts import BOX_KINDS
from medsam_lora.prompts.box import boxes_from_mask, jitter, to_model
from medsam_lora.sam_modules import PromptEncoder
from medsam_lora.transforms.resizing import masks_to_model_frame, model_scale


def test_the_configuration_offers_exactly_the_table():
    assert set(PromptConfig.model_fields["boxes"].annotation.__args__) == set(BOX_KINDS)


@pytest.mark.parametrize("kind", BOX_KINDS)
def test_every_kind_of_a_single_voxel_and_of_nothing(kind):
    mask = np.zeros((5, 7), bool)
    empty = boxes_from_mask(mask, kind)
    assert empty.shape == (0, 4) and empty.dtype == np.float32
    mask[4, 6] = True
    single = boxes_from_mask(mask, kind)
    assert single.tolist() == [[4.0, 6.0, 5.0, 7.0]] and single.dtype == np.float32


@pytest.mark.parametrize("kind", BOX_KINDS)
def test_every_foreground_voxel_lies_in_a_box_and_every_edge_touches_one(kind):
    for seed in range(20):
        mask = np.random.default_rng(seed).random((9, 8)) < 0.15
        boxes = boxes_from_mask(mask, kind).astype(int)
        covered = np.zeros_like(mask)
        for i0, j0, i1, j1 in boxes:
            covered[i0:i1, j0:j1] = True
            inner = mask[i0:i1, j0:j1]
            assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()
        assert not (mask & ~covered).any()


def components(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected components by growing, voxel by voxel."""
    left = {(int(i), int(j)) for i, j in np.argwhere(mask)}
    found = []
    while left:
        grown, border = set(), [left.pop()]
        while border:
            i, j = border.pop()
            grown.add((i, j))
            near = {(i + di, j + dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)} & left
            left -= near
            border += near
        found.append(grown)
    return found


@pytest.mark.parametrize("min_voxels", [1, 2, 4])
def test_components_equal_a_slow_oracle(min_voxels):
    for seed in range(20):
        mask = np.random.default_rng(seed).random((10, 9)) < 0.2
        expected = sorted(
            (min(i for i, _ in c), min(j for _, j in c), max(i for i, _ in c) + 1, max(j for _, j in c) + 1)
            for c in components(mask)
            if len(c) >= min_voxels
        )
        boxes = boxes_from_mask(mask, "per_component", min_voxels)
        assert sorted(tuple(int(e) for e in b) for b in boxes) == expected


def test_voxels_that_touch_at_a_corner_are_one_component_and_the_union_ignores_sizes():
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = mask[1, 1] = mask[5, 5] = True
    assert boxes_from_mask(mask, "per_component").tolist() == [[0, 0, 2, 2], [5, 5, 6, 6]]
    assert boxes_from_mask(mask, "per_component", 2).tolist() == [[0, 0, 2, 2]]
    assert boxes_from_mask(mask, "union", 2).tolist() == [[0, 0, 6, 6]]
    assert boxes_from_mask(mask, "per_component", 3).shape == (0, 4)


def test_jitter_moves_each_edge_uniformly_within_its_limit_in_native_voxels():
    boxes = np.tile([[40.0, 50.0, 80.0, 90.0]], (4000, 1))
    moved = jitter(boxes, 20.0, 5.0, (138, 202), np.random.default_rng(0))
    shift = moved - boxes
    assert np.abs(shift).max() <= 4.0  # 20 model pixels at 5 pixels per voxel
    np.testing.assert_allclose(shift.mean(axis=0), 0, atol=0.15)
    np.testing.assert_allclose(shift.var(axis=0), 8**2 / 12, rtol=0.06)  # uniform over a width of 8
    correlation = np.corrcoef(shift.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.06, "edges move independently"


def test_jitter_keeps_boxes_valid_and_inside():
    generator = np.random.default_rng(4)
    for _ in range(200):
        x, y = (int(n) for n in generator.integers(1, 20, 2))
        i0, j0 = int(generator.integers(0, x)), int(generator.integers(0, y))
        box = np.array([[i0, j0, generator.integers(i0 + 1, x + 1), generator.integers(j0 + 1, y + 1)]], float)
        ((a0, b0, a1, b1),) = jitter(box, 20.0, 1.0, (x, y), generator)
        assert a0 >= 0 and a1 <= x and b0 >= 0 and b1 <= y
        assert a1 - a0 >= 1 - 1e-5 and b1 - b0 >= 1 - 1e-5


def test_jitter_is_seeded_leaves_its_input_and_does_nothing_at_zero():
    boxes = np.array([[3.0, 4.0, 9.0, 8.0]], np.float32)
    first = jitter(boxes, 10, 5.0, (20, 20), np.random.default_rng(1))
    assert (first == jitter(boxes, 10, 5.0, (20, 20), np.random.default_rng(1))).all()
    assert (first != jitter(boxes, 10, 5.0, (20, 20), np.random.default_rng(2))).all()
    assert boxes.tolist() == [[3.0, 4.0, 9.0, 8.0]]
    assert jitter(boxes, 0, 5.0, (20, 20), np.random.default_rng(1)).tolist() == boxes.tolist()
    assert jitter(np.zeros((0, 4)), 10, 5.0, (20, 20), np.random.default_rng(1)).shape == (0, 4)


def test_the_model_box_frames_the_mask_in_the_model_frame():
    # A transposed or unscaled box would miss: rows are axis i, and SAM's x is the column.
    mask = np.zeros((138, 202), bool)
    mask[20:40, 100:170] = True
    scale, _ = model_scale(mask.shape, 1024)
    ((x0, y0, x1, y1),) = to_model(boxes_from_mask(mask), scale)
    framed = masks_to_model_frame(torch.from_numpy(mask)[None, None], 1024)[0, 0].numpy()
    rows, columns = np.flatnonzero(framed.any(1)), np.flatnonzero(framed.any(0))
    assert x0 == pytest.approx(columns[0], abs=1) and x1 == pytest.approx(columns[-1] + 1, abs=1)
    assert y0 == pytest.approx(rows[0], abs=1) and y1 == pytest.approx(rows[-1] + 1, abs=1)
    assert (x0, y1) == pytest.approx((100 * 1024 / 202, 40 * 1024 / 202))


def test_sams_prompt_encoder_reads_x_as_the_column():
    torch.manual_seed(0)
    encoder = PromptEncoder(8, (4, 4), (64, 64), 4)
    # The point of the encoder at (x, y) is the frequency encoding of (x, y) / size: the corner of a box must be the
    # dense encoding of the same place, whose rows are y.
    box = torch.from_numpy(to_model(np.array([[2, 5, 3, 6]], np.float32), 4.0))
    corner = encoder._embed_boxes(box)[0, 0] - encoder.point_embeddings[2].weight[0]
    # Edge (i, j) = (2, 5) at scale 4 is row 8, column 20; SAM adds half a pixel.
    expected = encoder.pe_layer.forward_with_coords(torch.tensor([[[20.5, 8.5]]]), (64, 64))[0, 0]
    dense = encoder.pe_layer((64, 64))[:, 8, 20]
    np.testing.assert_allclose(corner.detach().numpy(), expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(corner.detach().numpy(), dense.detach().numpy(), atol=1e-5)
