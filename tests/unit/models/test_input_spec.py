from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

from medsam_lora.config import ModelConfig
from medsam_lora.models.input_spec import INPUT_RANGES, PIXEL_MEAN, PIXEL_STD, InputSpec

MEAN = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
STD = torch.tensor(PIXEL_STD).view(3, 1, 1)


def raw(pixels: torch.Tensor) -> torch.Tensor:
    """Back to 0..255."""
    return pixels * STD + MEAN


def test_window_by_hand() -> None:
    # z from -2 to 4 becomes 0 to 255: (z + 2) / 6 * 255.
    z = torch.tensor([[[[0.0, -2.0, -5.0], [1.0, 4.0, 99.0]]]])
    pixels = InputSpec("window", low=-2, high=4).to_pixels(z)
    assert pixels.shape == (1, 3, 2, 3)
    expected = torch.tensor([[0.0, 0.0, 0.0], [127.5, 255.0, 255.0]])
    for colour in raw(pixels)[0]:
        torch.testing.assert_close(colour, expected, rtol=0, atol=1e-4)
    # (127.5 - 103.53) / 57.375 in blue.
    assert pixels[0, 2, 1, 0].item() == pytest.approx(0.41778, abs=1e-5)


def test_minmax_takes_each_image_by_its_own_foreground() -> None:
    first = [[0.0, -1.0], [1.0, 3.0]]
    second = [[0.0, 0.0], [10.0, 20.0]]
    pixels = raw(InputSpec("minmax").to_pixels(torch.tensor([[first], [second]])))
    torch.testing.assert_close(pixels[0, 1], torch.tensor([[0.0, 0.0], [127.5, 255.0]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels[1, 1], torch.tensor([[0.0, 0.0], [0.0, 255.0]]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("values", [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]], ids=["empty", "constant"])
def test_minmax_of_an_image_without_contrast_is_finite(values: list[list[float]]) -> None:
    pixels = raw(InputSpec("minmax").to_pixels(torch.tensor([[values]])))
    assert torch.isfinite(pixels).all()
    assert pixels[0, :, 0, 0].abs().max() < 1e-4


def test_zscore_is_passed_on() -> None:
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    pixels = INPUT_RANGES["zscore"].to_pixels(z)
    for colour in range(3):
        assert torch.equal(pixels[:, colour], z.flatten(0, 1))


@pytest.mark.parametrize("name", INPUT_RANGES)
def test_images_are_slice_major(name: str) -> None:
    # Image b * M + m is modality m of slice b, and depends on it alone.
    z = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    spec = INPUT_RANGES[name]
    together = spec.to_pixels(z)
    assert together.shape == (6, 3, 6, 5)
    for b in range(2):
        for m in range(3):
            torch.testing.assert_close(together[b * 3 + m], spec.to_pixels(z[b : b + 1, m : m + 1])[0])


@pytest.mark.parametrize("name", ["window", "minmax"])
def test_background_is_black_and_the_encoder_sees_contrast(name: str) -> None:
    z = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    z[..., :20] = 0
    pixels = INPUT_RANGES[name].to_pixels(z)
    torch.testing.assert_close(pixels[..., :20], (-MEAN / STD).expand(1, 3, 64, 20))
    grey = raw(pixels)[..., 20:]
    assert grey.min() + 1e-3 >= 0
    assert grey.max() <= 255 + 1e-3
    # Normalised twice, z-scores of deviation 1 would have a deviation of 0.017 here.
    assert pixels[..., 20:].std() > 0.3


def test_the_configuration_knows_the_same_names() -> None:
    annotation = ModelConfig.model_fields["input_range"].annotation
    assert set(INPUT_RANGES) == set(get_args(annotation))
    assert all(spec.name == name for name, spec in INPUT_RANGES.items())


@pytest.mark.parametrize("spec", [*INPUT_RANGES.values(), InputSpec("window", low=-0.1, high=7.25)])
def test_json_round_trip(spec: InputSpec) -> None:
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"name": "window", "low": 0.0}, "high"),
        ({"name": "window", "low": 0.0, "high": 1.0, "gamma": 2}, "gamma"),
        ({"name": "gamma", "low": 0.0, "high": 1.0}, "gamma"),
        ({"name": "window", "low": 1.0, "high": 1.0}, "below"),
        ({"name": "window", "low": 0.0, "high": float("inf")}, "finite"),
        ({"name": "window", "low": 0.0, "high": float("nan")}, "finite"),
        ({"name": "window"}, r"needs name, low and high: low, high missing$"),
        ({"nam": "window", "low": 0.0, "high": 1.0}, r": name missing; nam unknown$"),
        ("window", "a mapping"),
        ({"name": "window", "low": None, "high": 1.0}, "low"),
    ],
)
def test_what_makes_no_spec(data: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        InputSpec.from_json(data)
