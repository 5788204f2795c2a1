"""What the base model sees: z-scored slices mapped to the pixels its weights were trained on, once, for every method.

SAM was trained on 8-bit photographs, normalised with ImageNet's mean and deviation on 0..255. A z-scored slice is
therefore mapped to 0..255 first. `docs/decisions/0001-input-range.md` has the measurement behind the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

PIXEL_MEAN: Final = (123.675, 116.28, 103.53)
PIXEL_STD: Final = (58.395, 57.12, 57.375)
"""Of red, green and blue on 0..255, as every SAM was trained (segment_anything 1.0, build_sam.py)."""

WHITE: Final = 255.0

Range = Literal["window", "minmax", "zscore"]


@dataclass(frozen=True)
class InputSpec:
    """The map from z-scores to normalised pixels. An adapter file records it, and it is never changed after training.

    Parameters
    ----------
    name : {"window", "minmax", "zscore"}
        ``window``: z from `low` to `high` becomes 0 to 255 linearly, clipped. ``minmax``: the smallest to the largest
        z of each image's foreground becomes 0 to 255. ``zscore``: the z-scores themselves stand in for normalised
        pixels; an ablation.
    low, high : float
        The window, in deviations; unused by the others.

    Raises
    ------
    ValueError
        For an unknown name or a window that is not one.
    """

    name: Range
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(Range):
            raise ValueError(f"input range {self.name!r}; known: {', '.join(get_args(Range))}")
        if not -float("inf") < self.low < self.high < float("inf"):
            raise ValueError(f"window from {self.low} to {self.high}: low must be below high, both finite")

    def to_pixels(self, z: Tensor) -> Tensor:
        """Normalised pixels of z-scored slices, ready to be resized to the model frame.

        Parameters
        ----------
        z : Tensor of float, shape (B, M, X, Y)
            Modality m of slice b; background exactly 0.

        Returns
        -------
        Tensor of float, shape (B * M, 3, X, Y)
            Image ``b * M + m``, the same grey in all three colours. Background is black (pixel value 0).

        Examples
        --------
        >>> z = torch.tensor([[[[0.0, -3.0], [1.0, 9.0]]]])
        >>> pixels = InputSpec("window", low=-3.0, high=5.0).to_pixels(z)[0, 0] * PIXEL_STD[0] + PIXEL_MEAN[0]
        >>> pixels.round(decimals=1).tolist()
        [[0.0, 0.0], [127.5, 255.0]]
        """
        images = z.flatten(0, 1).unsqueeze(1)
        if self.name == "zscore":
            return images.expand(-1, 3, -1, -1)
        background = images == 0
        low, high = (self.low, self.high) if self.name == "window" else _extremes(images, background)
        grey = ((images - low) / (high - low)).clamp(0, 1).masked_fill(background, 0)
        mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
        return grey * (WHITE / std) - mean / std

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` makes an equal spec of."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputSpec:
        """The spec that `to_json` described.

        Raises
        ------
        ValueError
            For missing or unknown keys, or values that make no spec.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"an input spec is a mapping, not {data!r}")
        known = [field.name for field in fields(cls)]
        wrong = {
            "missing": [name for name in known if name not in data],
            "unknown": [str(name) for name in data if name not in known],
        }
        if any(wrong.values()):
            text = "; ".join(f"{', '.join(names)} {kind}" for kind, names in wrong.items() if names)
            raise ValueError(f"an input spec needs name, low and high: {text}")
        try:
            low, high = float(data["low"]), float(data["high"])
        except TypeError as error:
            raise ValueError(f"low and high of an input spec are numbers ({error})") from error
        return cls(data["name"], low, high)


def _extremes(images: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest foreground value of every image, shape (n, 1, 1, 1); 0 and 1 where it has one or none."""
    low = images.masked_fill(background, torch.inf).amin(dim=(1, 2, 3), keepdim=True)
    high = images.masked_fill(background, -torch.inf).amax(dim=(1, 2, 3), keepdim=True)
    flat = ~(high > low)
    return low.masked_fill(flat, 0), high.masked_fill(flat, 1)


INPUT_RANGES: Final[Mapping[str, InputSpec]] = {
    "window": InputSpec("window", low=-1.0, high=3.0),
    "minmax": InputSpec("minmax"),
    "zscore": InputSpec("zscore"),
}
"""The input ranges by the name `model.input_range` has in the configuration."""
