"""Samples are functions of (seed, epoch, index), and boxes belong to what they are drawn around."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from medsam_lora.errors import TrainingError
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import PreparedSlices
from medsam_lora.training.dataset import PromptOptions, SliceDataset, epoch_order, plan_batches


def test_a_sample_is_the_normalised_slice_with_its_own_box(training_cases: list[PreparedSlices]) -> None:
    dataset = SliceDataset(training_cases, ["WT"], PromptOptions(), 64)
    assert len(dataset) == 6
    case, n = training_cases[1], 2
    sample = dataset.sample(5)
    raw = case.image[n].astype(np.float64)
    expected = np.where(raw != 0, (raw - case.mean[n][:, None, None]) / case.std[n][:, None, None], 0)
    np.testing.assert_allclose(sample.z, expected, atol=1e-5)
    assert (sample.z[raw == 0] == 0).all()
    np.testing.assert_array_equal(sample.masks[0], case.label[n] > 0)
    np.testing.assert_array_equal(sample.boxes, boxes_from_mask(case.label[n] > 0))


def test_samples_repeat_and_leave_the_global_generators_alone(training_cases: list[PreparedSlices]) -> None:
    dataset = SliceDataset(training_cases, ["WT"], PromptOptions(jitter_px=8), 64)
    np_state, torch_state = np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    one = dataset.batch([0, 3], (7, 1), flip=True)
    two = dataset.batch([3, 0], (7, 1), flip=True)
    other_epoch = dataset.batch([0, 3], (7, 2), flip=True)
    assert torch.equal(one.z[0], two.z[1])
    np.testing.assert_array_equal(one.boxes[0], two.boxes[1])
    assert not all(np.array_equal(a, b) for a, b in zip(one.boxes, other_epoch.boxes, strict=True))
    assert str(np.random.get_state()) == str(np_state)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_a_flip_moves_image_mask_and_box_together(training_cases: list[PreparedSlices]) -> None:
    dataset = SliceDataset(training_cases, ["WT"], PromptOptions(), 64)
    plain = dataset.batch([0])
    flipped = next(
        b for seed in range(50) if not torch.equal((b := dataset.batch([0], (seed, 1), flip=True)).z, plain.z)
    )
    torch.testing.assert_close(flipped.z, plain.z.flip(2))
    assert torch.equal(flipped.masks, plain.masks.flip(2))
    np.testing.assert_array_equal(flipped.boxes[0], boxes_from_mask(flipped.masks[0, 0].numpy()))


def test_a_slice_without_tumour_is_prompted_with_the_nearest_box(training_cases: list[PreparedSlices]) -> None:
    case = training_cases[0]
    label = case.label.copy()
    label[0] = 0
    dataset = SliceDataset([dataclasses.replace(case, label=label)], ["WT"], PromptOptions(), 64)
    sample = dataset.sample(0)
    assert not sample.masks.any()
    np.testing.assert_array_equal(sample.boxes, boxes_from_mask(label[1] > 0))


def test_cases_without_reference_or_tumour_are_refused(training_cases: list[PreparedSlices]) -> None:
    blank = dataclasses.replace(training_cases[0], label=np.zeros_like(training_cases[0].label))
    with pytest.raises(TrainingError, match="no slice shows"):
        SliceDataset([blank], ["WT"], PromptOptions(), 64)
    with pytest.raises(TrainingError, match="case a: the case has no reference"):
        SliceDataset([dataclasses.replace(training_cases[0], label=None)], ["WT"], PromptOptions(), 64)


def test_the_order_covers_every_item_once_and_differs_between_epochs() -> None:
    first, second = epoch_order(50, 3, 1), epoch_order(50, 3, 2)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert epoch_order(50, 3, 1, limit=20) == first[:20]


def test_batches_hold_one_shape_each_and_every_item() -> None:
    shapes = [(2, 2), (3, 3), (2, 2), (2, 2), (3, 3)]
    batches = plan_batches([10, 11, 12, 13, 14], shapes, 2)
    assert batches == [[10, 12], [11, 14], [13]]


def test_more_draws_than_slices_are_the_slices_again_jittered_anew(training_cases: list[PreparedSlices]) -> None:
    order = epoch_order(6, 3, 1, limit=15)
    assert order[:6] == epoch_order(6, 3, 1) and len(set(order)) == 15
    assert [sorted(item % 6 for item in order[first : first + 6]) for first in (0, 6)] == [list(range(6))] * 2
    dataset = SliceDataset(training_cases, ["WT"], PromptOptions(jitter_px=8), 64)
    first, again = dataset.batch([2], (7, 1)), dataset.batch([8], (7, 1))
    assert torch.equal(first.z, again.z) and dataset.shape(8) == dataset.shape(2)
    assert not np.array_equal(first.boxes[0], again.boxes[0])
