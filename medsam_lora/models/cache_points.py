"""The image encoder cut in two at a cache point: what no training changes, and what comes behind it.

Cache points are those of `peft.contract.Report`: ``block k`` is the input of attention block k, ``trunk`` the input of
the neck, ``embedding`` the encoder's output. An activation in the trunk has its channels last, (B, h, w, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from medsam_lora.models.tiny_vit import TinyViT, TinyViTBlock
from medsam_lora.models.vit import run_block
from medsam_lora.sam_modules import ImageEncoderViT

Step = tuple[int | None, Callable[[Tensor], Tensor]]
"""A part of the trunk: the number of the attention block that it is, or None, and the part."""


def until(encoder: nn.Module, pixels: Tensor, point: str) -> Tensor:
    """What the encoder computes up to a cache point, without autograd.

    Parameters
    ----------
    encoder : Module
        SAM's ViT or `TinyViT`.
    pixels : Tensor of float, shape (B, 3, h, w)
    point : str

    Returns
    -------
    Tensor
        Shape (B, h', w', C) for ``block k`` and ``trunk``, (B, D, h/P, w/P) for ``embedding``.

    Raises
    ------
    ValueError
        Where the encoder has no such point.
    """
    with torch.no_grad():
        if point == "embedding":
            return encoder(pixels)
        first = _first_block(encoder, point)
        x = _stem(encoder, pixels)
        for number, step in _trunk(encoder):
            if number == first:
                break
            x = step(x)
        # Laid out as it will be read from a cache, so that both are followed by the same arithmetic to the last bit.
        return x.contiguous()


def onward(encoder: nn.Module, activation: Tensor, point: str) -> Tensor:
    """The embedding (B, D, h/P, w/P) from what `until` gave.

    Raises
    ------
    ValueError
        As `until`.
    """
    if point == "embedding":
        return activation
    first = _first_block(encoder, point)
    x, begun = activation, False
    for number, step in _trunk(encoder):
        begun = begun or number == first
        if begun:
            x = step(x)
    return encoder.neck(x.permute(0, 3, 1, 2))  # type: ignore[operator]


def _first_block(encoder: nn.Module, point: str) -> int:
    """The attention block that a point is the input of; behind the last one for the trunk."""
    count = sum(number is not None for number, _ in _trunk(encoder))
    if point == "trunk":
        return count
    kind, _, number = point.partition(" ")
    if kind != "block" or not number.isdecimal() or not int(number) < count:
        raise ValueError(f"cache point {point!r}: an encoder of {count} blocks has embedding, trunk and block 0 to k")
    return int(number)


def _stem(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """What comes before all attention blocks, channels last."""
    if isinstance(encoder, TinyViT):
        x = encoder.patch_embed(pixels.contiguous(memory_format=torch.channels_last))
        return encoder.layers[0](x).permute(0, 2, 3, 1)
    if not isinstance(encoder, ImageEncoderViT):
        raise ValueError(f"{type(encoder).__name__} has no cache points")
    x = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed[:, : x.shape[1], : x.shape[2]]
    return x


def _trunk(encoder: nn.Module) -> Iterator[Step]:
    """The parts between stem and neck, in the order they run."""
    if isinstance(encoder, ImageEncoderViT):
        for number, block in enumerate(encoder.blocks):
            yield number, _block(encoder, block)
        return
    if not isinstance(encoder, TinyViT):
        raise ValueError(f"{type(encoder).__name__} has no cache points")
    number = 0
    for stage in list(encoder.layers)[1:]:
        for block in stage.blocks:  # type: ignore[union-attr]
            assert isinstance(block, TinyViTBlock)
            yield number, _block(encoder, block)
            number += 1
        if stage.downsample is not None:
            yield None, _merged(stage.downsample)  # type: ignore[arg-type]


def _block(encoder: nn.Module, block: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: run_block(block, x, bool(getattr(encoder, "checkpointing", False)))


def _merged(merge: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: merge(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
