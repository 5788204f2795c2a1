"""What the check `overfit` aims at, and what it says of how an attempt ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medsam_lora.config import build_config
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


def curve(dices: list[float], losses: tuple[float, float], area: float) -> list[dict[str, Any]]:
    """An attempt as `_attempt` notes it."""
    falling = np.linspace(*losses, len(dices))
    rows = zip(dices, falling, strict=True)
    return [
        {"update": 5 * n, "loss": loss, "dice": d, "lowest": d, "area_ratio": area} for n, (d, loss) in enumerate(rows)
    ]


def attempted(lr: float = 1e-4, decoder: str = "full") -> Any:
    config = build_config({"train": {"lr": lr}, "method": {"decoder": decoder}})
    tensors = [SimpleNamespace(name="image_encoder.A")]
    segmenter = SimpleNamespace(
        fusion=torch.nn.Identity(), adaptation=SimpleNamespace(report=SimpleNamespace(tensors=tensors))
    )
    return SimpleNamespace(
        config=config, segmenter=segmenter, fresh=lambda: segmenter, slices=[0] * 4, steps=25, minutes=1.0, updates=0
    )


@pytest.mark.parametrize(
    ("losses", "area", "said", "remedy"),
    [
        ((1.0, 0.3), 0.02, "Only 2% of the tumour's area is marked while the loss falls", "train.dice_weight=1"),
        ((1.0, 0.9), 0.02, "Only 2% of the tumour's area is marked: the prediction slides", "train.dice_weight=1"),
        ((1.0, 0.3), 0.97, "The loss falls to 30% of its start and 97% of the tumour's area", "box and labels"),
        ((1.0, 0.9), 0.97, "Four slices cannot be learned by heart", "raise train.lr"),
    ],
)
def test_a_flat_curve_is_put_down_to_what_it_shows(
    losses: tuple[float, float], area: float, said: str, remedy: str
) -> None:
    meaning, advice = learning._why(attempted(), curve([0.4] * 5, losses, area), 0.4, late=False)
    assert meaning.startswith(said) and remedy in advice
    assert ("background, which" in meaning) == (area < 0.1)


@pytest.mark.parametrize(("first", "said"), [(0.96, False), (0.62, True)])
def test_slices_learned_at_raised_rates_only_are_ok_and_the_rates_called_low(
    first: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, counted = {1.0: first, 10.0: 0.97}, iter((first, 0.97))
    monkeypatch.setattr(learning, "ceiling", lambda _: 1.0)
    monkeypatch.setattr(learning, "_attempt", lambda s, m, factor, *_: curve([0.5, ends[factor]], (1.0, 0.2), 1.0))
    monkeypatch.setattr(learning, "_dice_in_training", lambda *_: next(counted))
    result = learning.overfit(attempted(lr=2e-6))
    # With the first attempt, where it is enough, nothing is said.
    assert result.status == "ok" and (not said or "at 10 times the learning rates" in result.measured)
    low = "at the rates of the settings (train.lr=2e-06) only Dice 0.620: they are low for so few updates, raise them"
    assert (low in result.measured) == said
