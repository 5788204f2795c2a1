"""What the check `overfit` aims at, and what it says of how an attempt ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medsam_lora.doctor import learning
from medsam_lora.transforms.resizing import through_decoder_grid


def subject_of(labels: list[np.ndarray], regions: tuple[str, ...], image_size: int = 64) -> Any:
    """As much of a subject as the aim needs: one slice per label map."""
    segmenter = SimpleNamespace(regions=regions, sam=SimpleNamespace(image_size=image_size))
    return SimpleNamespace(slices=[SimpleNamespace(label=label[None]) for label in labels], segmenter=segmenter)


def test_the_aim_is_the_mean_over_the_regions_as_validation_counts_them() -> None:
    whole, rim, spot = (np.zeros((64, 64), np.uint8) for _ in range(3))
    whole[8:40] = 2  # edges on the decoder's grid of 4 px and no corner: nothing is lost
    rim[8:40], spot[8:40] = 2, 2
    rim[10:37, 10:37] = 3
    spot[9, 9] = 3  # less than half of a cell: nothing is left of it
    square = torch.from_numpy(rim == 3)[None, None]
    left = through_decoder_grid(square, 64)
    blunted = 2 * int((left & square).sum()) / int(left.sum() + square.sum())
    assert 0.5 < blunted < 0.99
    three = ("WT", "TC", "ET")
    assert learning.ceiling(subject_of([whole], ("WT",))) == 1
    # No core, nothing said of one: validate_case counts 1.
    assert learning.ceiling(subject_of([whole], three)) == 1
    assert learning.ceiling(subject_of([rim], three)) == pytest.approx((1 + 2 * blunted) / 3)
    assert learning.ceiling(subject_of([spot], three)) == pytest.approx(1 / 3)
    assert learning.ceiling(subject_of([whole, rim], three)) == pytest.approx((3 + 1 + 2 * blunted) / 6)
