"""Looking at what a segmenter's parts are given while the program's own code runs, and a decoder that only repeats.

Nothing of the path is written a second time here: the checks run training and prediction as they are, and look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD
from medsam_lora.models.segmenter import N_TOKENS, Segmenter
from medsam_lora.transforms.resizing import PIXELS_PER_GRID_CELL, model_scale


@dataclass
class Seen:
    """What went into the image encoder and the prompt encoder, call by call.

    Parameters
    ----------
    pixels : list of Tensor, shape (n, 3, h, w)
        Model frame, as the first layer of the encoder is given them.
    boxes_model : list of Tensor, shape (n, 4)
        XYXY in model pixels.
    """

    pixels: list[Tensor] = field(default_factory=list)
    boxes_model: list[Tensor] = field(default_factory=list)


@contextmanager
def watching(segmenter: Segmenter) -> Iterator[Seen]:
    """Within this context everything that the encoders of a segmenter are given is noted."""
    seen = Seen()
    first = segmenter.sam.get_submodule("image_encoder.patch_embed")

    def note_pixels(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.pixels.append(given[0].detach().float().cpu().contiguous())

    def note_boxes(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        boxes = named["boxes"] if "boxes" in named else given[1]
        if boxes is not None:
            seen.boxes_model.append(boxes.detach().float().cpu().clone())

    hooks = [
        first.register_forward_pre_hook(note_pixels),
        segmenter.sam.prompt_encoder.register_forward_pre_hook(note_boxes, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def repeating(segmenter: Segmenter, seen: Seen) -> Iterator[None]:
    """Within this context the decoder answers with the bright part of the picture that the encoder was last given.

    What is drawn into an image then has to come back as the mask, at the same voxels: a test of all frames.

    Parameters
    ----------
    segmenter : Segmenter
    seen : Seen
        From `watching` the same segmenter.
    """
    own = segmenter.sam.decode

    def repeat(
        embedding: Tensor, boxes: Tensor | None, counts: Sequence[int] | None = None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        own(embedding, boxes, counts, *rest)  # for the prompt encoder, which is watched
        pixels = seen.pixels[-1]
        pixels = pixels[:: len(pixels) // len(embedding), :1] if len(pixels) > len(embedding) else pixels[:, :1]
        bright = (pixels - _middle(pixels)).to(embedding)
        each = torch.tensor([1] * len(embedding) if counts is None else list(counts), device=embedding.device)
        logits = functional.avg_pool2d(bright, PIXELS_PER_GRID_CELL).repeat_interleave(each, dim=0)
        return logits.expand(-1, N_TOKENS, -1, -1), logits.new_ones(len(logits), N_TOKENS)

    segmenter.sam.decode = repeat  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del segmenter.sam.decode


def bright_box(pixels: Tensor) -> Tensor:
    """The box around the bright part of one picture (3, h, w) of two levels, XYXY on pixel edges."""
    rows, columns = torch.nonzero(pixels[0] > _middle(pixels), as_tuple=True)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)


def box_iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes XYXY.

    Examples
    --------
    >>> box_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
    0.3333333432674408
    """
    low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
    overlap = (high - low).clamp(min=0).prod()
    areas = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()
    return float(overlap / (areas - overlap))


def grey(pixels: Tensor, shape: tuple[int, int], image_size: int) -> Tensor:
    """Normalised pixels (n, 3, h, w) as grey values of 0 to 255, without the padding: (n, rows, columns).

    Parameters
    ----------
    pixels : Tensor
        Model frame.
    shape : tuple of int, (X, Y)
        Of the slices, on the crop grid.
    image_size : int
    """
    _, (rows, columns) = model_scale(shape, image_size)
    return pixels[:, 0, :rows, :columns] * PIXEL_STD[0] + PIXEL_MEAN[0]


def _middle(pixels: Tensor) -> Tensor:
    return (pixels.min() + pixels.max()) / 2
