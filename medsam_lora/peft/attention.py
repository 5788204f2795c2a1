"""The self-attention of an image encoder, taken apart so that a method can add keys and values to it.

Keys that are added have no place on the image's grid, so the relative positions are left to the real ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medsam_lora.errors import AdapterError
from medsam_lora.sam_modules import Attention, add_decomposed_rel_pos

_SAM_ATTRIBUTES = ("num_heads", "scale", "qkv", "proj", "rel_pos_h", "rel_pos_w")


class Parts(NamedTuple):
    """What attention computes before its softmax.

    Parameters
    ----------
    q : Tensor, shape (n, heads, N, d)
        Scaled queries of n windows.
    scores : Tensor, shape (n, heads, N, N)
        With relative positions.
    v : Tensor, shape (n, heads, N, d)
    """

    q: Tensor
    scores: Tensor
    v: Tensor


def take_apart(attention: nn.Module, x: Tensor) -> Parts:
    """The parts of an attention for its input.

    For SAM's own `Attention` the operations, and so the bits, are those of its `forward` on the CPU.

    Parameters
    ----------
    attention : Module
        SAM's `Attention` or one with its attributes, or one with a method ``attention_parts(x) -> q, k, v, bias`` as
        TinyViT's has.
    x : Tensor, shape (n, ..., C)
        Windows, or the whole grid.

    Raises
    ------
    AdapterError
        For any other module.
    """
    if isinstance(attention, Attention) or all(hasattr(attention, name) for name in _SAM_ATTRIBUTES):
        return _of_sam(attention, x)
    describe = getattr(attention, "attention_parts", None)
    if describe is None:
        raise AdapterError(
            f"the attention {type(attention).__name__} does not say how it is computed",
            remedy="Give it a method attention_parts(x) that returns q, k, v and the bias of the scores.",
        )
    q, k, v, bias = describe(x)
    q = q * q.shape[-1] ** -0.5
    return Parts(q, q @ k.transpose(-2, -1) + bias, v)


def _of_sam(attention: Any, x: Tensor) -> Parts:
    n, height, width, _ = x.shape
    heads, cells = attention.num_heads, height * width
    qkv = attention.qkv(x).reshape(n, cells, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, n * heads, cells, -1).unbind(0)
    scaled = q * attention.scale
    scores = scaled @ k.transpose(-2, -1)
    if getattr(attention, "use_rel_pos", True):
        tables = _middle(attention.rel_pos_h, height), _middle(attention.rel_pos_w, width)
        scores = add_decomposed_rel_pos(scores, q, *tables, (height, width), (height, width))
    return Parts(*(part.unflatten(0, (n, heads)) for part in (scaled, scores, v)))


def _middle(table: Tensor, size: int) -> Tensor:
    """Relative positions (2 L - 1, d) for the `size` cells of a smaller grid: those of its distances, not stretched."""
    length = (table.shape[0] + 1) // 2
    return table[length - size : length + size - 1] if size < length else table


def put_together(attention: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """The attention's output from that of its heads.

    Parameters
    ----------
    attention : Module
        With a Linear ``proj``.
    out : Tensor, shape (n, heads, N, d)
    x : Tensor, shape (n, ..., C)
        The attention's input.
    """
    joined = out.transpose(1, 2).reshape(*x.shape[:-1], -1)
    result: Tensor = attention.get_submodule("proj")(joined)
    return result


def join_softmax(parts: Parts, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the real keys and p added ones under one softmax.

    Parameters
    ----------
    parts : Parts
    k, v : Tensor, shape (heads, p, d)
        The same for every window.

    Returns
    -------
    Tensor, shape (n, heads, N, d)
    """
    cells = parts.scores.shape[-1]
    scores = torch.cat([parts.scores, parts.q @ k.transpose(-2, -1)], dim=-1)
    weights = scores.softmax(dim=-1)
    return weights[..., :cells] @ parts.v + weights[..., cells:] @ v
