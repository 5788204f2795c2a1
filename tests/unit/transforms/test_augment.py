"""Mirroring left and right."""

from __future__ import annotations

import numpy as np
import torch

from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.transforms.augment import flip_left_right, random_flip

IMAGE = np.random.default_rng(0).normal(size=(4, 7, 5)).astype(np.float32)
MASK = np.zeros((1, 7, 5), bool)
MASK[0, 1:3, 2:5] = True


def test_the_box_of_the_mirrored_mask_is_the_mirrored_box():
    image, mask, boxes = flip_left_right(IMAGE, MASK, boxes_from_mask(MASK[0]))
    np.testing.assert_array_equal(boxes, boxes_from_mask(mask[0]))
    assert boxes.tolist() == [[4.0, 2.0, 6.0, 5.0]]  # 7 - 3 and 7 - 1
    np.testing.assert_array_equal(image[:, 6], IMAGE[:, 0])
    np.testing.assert_array_equal(image[:, 2], IMAGE[:, 4])


def test_twice_is_the_input_and_the_input_is_untouched():
    before = IMAGE.copy()
    boxes = np.array([[0.25, 1, 3.5, 2]], np.float32)
    once = flip_left_right(IMAGE, MASK, boxes)
    image, mask, back = flip_left_right(*once)
    np.testing.assert_array_equal(IMAGE, before)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(mask, MASK)
    np.testing.assert_allclose(back, boxes)


def test_arrays_can_go_on_to_torch_and_tensors_flip_alike():
    boxes = boxes_from_mask(MASK[0])
    image, mask, _ = flip_left_right(IMAGE, MASK, boxes)
    tensor, tensor_mask, _ = flip_left_right(torch.from_numpy(IMAGE), torch.from_numpy(MASK), boxes)
    assert torch.equal(torch.from_numpy(image), tensor) and torch.equal(torch.from_numpy(mask), tensor_mask)


def test_the_random_flip_follows_its_generator_alone():
    np.random.seed(1)  # noqa: NPY002  the global state must not matter, nor change
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    outcomes = []
    for seed in range(40):
        image, _, _ = random_flip(IMAGE, MASK, np.zeros((0, 4)), np.random.default_rng(seed))
        expected = np.random.default_rng(seed).random() < 0.5
        assert (image is not IMAGE) == expected
        outcomes.append(expected)
    assert 8 < sum(outcomes) < 32
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert random_flip(IMAGE, MASK, np.zeros((0, 4)), np.random.default_rng(0), 0.0)[0] is IMAGE
