"""The model frame against SAM's own rules, written out slowly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from medsam_lora.transforms.resizing import (
    covered_frame,
    masks_from_model_frame,
    masks_to_model_frame,
    model_scale,
    to_model_frame,
    to_native_frame,
)

PLANES = [(138, 202), (240, 240), (17, 5), (1, 9), (33, 34)]


def long_side_size(x: int, y: int, target: int) -> tuple[int, int]:
    """ResizeLongestSide's rule, in exact arithmetic: n * target / longest, halves upwards."""
    longest = max(x, y)
    return (2 * x * target + longest) // (2 * longest), (2 * y * target + longest) // (2 * longest)


def postprocess_masks(masks: torch.Tensor, image_size: int, size: tuple[int, int], shape: tuple[int, int]):
    """Sam.postprocess_masks, step by step."""
    frame = functional.interpolate(masks, (image_size, image_size), mode="bilinear", align_corners=False)
    return functional.interpolate(frame[..., : size[0], : size[1]], shape, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("image_size", [1024, 512, 256, 64])
@pytest.mark.parametrize("plane", PLANES)
def test_sizes_follow_resize_longest_side(plane, image_size):
    scale, size = model_scale(plane, image_size)
    assert scale == image_size / max(plane)
    assert size == long_side_size(*plane, image_size)
    assert max(size) == image_size


def test_the_size_of_the_thesis():
    assert model_scale((138, 202), 1024)[1] == (700, 1024)


def test_images_are_resized_bilinearly_at_half_pixel_centres_and_padded_at_the_end():
    # One row 0, 4 enlarged by 4: centres at (p + 0.5) / 4 - 0.5 = -0.375, -0.125, 0.125 ... clamped to 0 and 1.
    image = torch.tensor([[[[0.0, 4.0]]]])
    framed = to_model_frame(image, 8)
    assert framed.shape == (1, 1, 8, 8)
    expected = [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]
    np.testing.assert_allclose(framed[0, 0, 0].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(framed[0, 0, 3].numpy(), expected, atol=1e-6)
    assert not framed[0, 0, 4:].any(), "rows 4 to 7 are padding"


@pytest.mark.parametrize("plane", PLANES)
def test_each_frame_pixel_interpolates_its_four_neighbours(plane):
    generator = np.random.default_rng(1)
    image = generator.normal(size=plane)
    framed = to_model_frame(torch.from_numpy(image)[None, None], 64)[0, 0].numpy()
    h, w = model_scale(plane, 64)[1]
    assert not framed[h:].any() and not framed[:, w:].any()
    for p, q in generator.integers(0, (h, w), (20, 2)):
        i = np.clip((p + 0.5) * plane[0] / h - 0.5, 0, plane[0] - 1)
        j = np.clip((q + 0.5) * plane[1] / w - 0.5, 0, plane[1] - 1)
        i0, j0 = int(i), int(j)
        i1, j1 = min(i0 + 1, plane[0] - 1), min(j0 + 1, plane[1] - 1)
        a, b = i - i0, j - j0
        expected = (1 - a) * ((1 - b) * image[i0, j0] + b * image[i0, j1]) + a * (
            (1 - b) * image[i1, j0] + b * image[i1, j1]
        )
        assert framed[p, q] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("image_size", [1024, 256])
@pytest.mark.parametrize("plane", [(138, 202), (240, 240), (33, 34)])
def test_masks_to_the_frame_and_back_are_exact(plane, image_size):
    masks = torch.from_numpy(np.random.default_rng(3).random((2, 1, *plane)) < 0.5)
    framed = masks_to_model_frame(masks, image_size)
    assert framed.dtype == torch.bool and framed.shape == (2, 1, image_size, image_size)
    assert torch.equal(masks_from_model_frame(framed, plane), masks)


def test_labels_stay_the_labels_they_were():
    labels = torch.tensor([0, 1, 2, 3], dtype=torch.uint8).repeat(5, 5).reshape(1, 1, 10, 10)
    framed = masks_to_model_frame(labels, 37)
    assert framed.dtype == torch.uint8 and set(framed.unique().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("plane", "image_size", "grid"),
    [((138, 202), 1024, 256), ((96, 80), 256, 64), ((60, 77), 512, 128), ((5, 3), 64, 16)],
)
def test_the_way_back_equals_sams_postprocess_masks(plane, image_size, grid):
    logits = torch.randn(2, 3, grid, grid, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    ours = to_native_frame(logits, image_size, plane)
    theirs = postprocess_masks(logits.double(), image_size, model_scale(plane, image_size)[1], plane)
    assert ours.shape == (2, 3, *plane) and ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)


def test_the_way_back_has_the_gradient_of_postprocess_masks():
    logits = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    weights = torch.randn(1, 2, 9, 13, generator=torch.Generator().manual_seed(2))
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    (to_native_frame(ours, 64, (9, 13)) * weights).sum().backward()
    (postprocess_masks(theirs, 64, model_scale((9, 13), 64)[1], (9, 13)) * weights).sum().backward()
    assert ours.grad is not None and theirs.grad is not None and theirs.grad.abs().max() > 0.1
    np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy(), atol=1e-5)


def test_the_way_back_stays_in_float32_under_autocast():
    logits = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = to_native_frame(logits, 64, (9, 13))
    with torch.autocast("cpu", torch.bfloat16):
        under = to_native_frame(logits, 64, (9, 13))
    assert under.dtype == torch.float32 and torch.equal(under, expected)
    assert to_native_frame(logits.bfloat16(), 64, (9, 13)).dtype == torch.float32


def test_what_was_first_used_in_inference_mode_can_train_afterwards():
    with torch.inference_mode():
        to_native_frame(torch.zeros(1, 1, 16, 16), 64, (11, 12))
    logits = torch.zeros(1, 1, 16, 16, requires_grad=True)
    to_native_frame(logits, 64, (11, 12)).sum().backward()
    assert logits.grad is not None and logits.grad.sum() == pytest.approx(11 * 12, rel=1e-4)


@pytest.mark.parametrize(("plane", "size"), [((138, 202), 1024), ((202, 138), 1024), ((9, 13), 64), ((13, 13), 64)])
def test_the_part_that_an_image_covers(plane, size):
    h, w = covered_frame(plane, size)
    _, (rows, columns) = model_scale(plane, size)
    assert h % 16 == w % 16 == 0 and 0 <= h - rows < 16 and 0 <= w - columns < 16
    image = torch.randn(1, 2, *plane, generator=torch.Generator().manual_seed(0))
    whole, part = to_model_frame(image, size), to_model_frame(image, size, (h, w))
    assert torch.equal(part, whole[..., :h, :w]) and not whole[..., rows:, :].any()


def test_the_way_back_from_a_part_of_the_frame_is_that_of_the_frame_but_at_its_border():
    plane, size = (9, 13), 64
    (h, w) = covered_frame(plane, size)
    assert (h, w) == (48, 64)
    logits = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = to_native_frame(logits, size, plane)
    part = to_native_frame(logits[..., : h // 4, : w // 4], size, plane, (h, w))
    # The last row looks over the border of the part: there is nothing there, so that it keeps to what is inside.
    assert torch.allclose(part[..., :-1, :], whole[..., :-1, :], atol=1e-6)
    assert part.shape == whole.shape
