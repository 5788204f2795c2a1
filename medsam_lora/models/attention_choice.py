"""Which way of computing attention runs where, as a table with the reasons.

`model.attention` names a way, or ``auto``. Importing this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class AttentionSpec:
    """A way of computing the image encoder's attention.

    Parameters
    ----------
    summary : str
    keeps : str
        What it keeps for the backward pass.
    reason : str
        Where it is the right one, and on which ground.
    """

    summary: str
    keeps: str
    reason: str


ATTENTIONS: Final[Mapping[str, AttentionSpec]] = {
    "reference": AttentionSpec(
        "segment_anything's own modules, untouched",
        "two N x N matrices per head",
        "to compare with; padded grid only, as upstream stretches relative positions over any other",
    ),
    "chunked": AttentionSpec(
        "pieces of the score matrix in the cache, computed again in the backward pass",
        "queries, keys, values",
        "CPU: fused kernels there are slower, as longer queries triple the products, but for whole grids of 64 x 64 "
        "in bfloat16, where they keep more (docs/performance.md)",
    ),
    "augmented": AttentionSpec(
        "positions folded into query and key, one fused kernel",
        "longer queries and keys, values, output",
        "CUDA: no bias, so that flash, memory-efficient and cuDNN kernels take it, forward and backward",
    ),
    "biased": AttentionSpec(
        "positions as the mask of one fused kernel",
        "one N x N matrix per head",
        "CUDA, global blocks, where memory is no matter: shorter products than augmented",
    ),
}
"""The ways by the name `model.attention` has in the configuration."""


@dataclass(frozen=True)
class Choice:
    """What one block runs.

    Parameters
    ----------
    name : str
        A key of `ATTENTIONS`.
    qk_width, v_width : int
        Widths that heads are padded to (`attention.augmented`); 0 where they are not.
    reason : str
    """

    name: str
    qk_width: int = 0
    v_width: int = 0
    reason: str = ""


# cuDNN's kernel on Hopper takes queries and keys of 192 with values of 128, or all of them up to 128; flash takes one
# width for all, up to 256. Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.10.
_CUDNN_WIDTHS: Final = 192, 128
_HOPPER: Final = 9
_ONE_WIDTH_UP_TO: Final = 128


def choose(
    name: str, device: str, head_width: int, grid: tuple[int, int], half: bool, capability: tuple[int, int] = (0, 0)
) -> Choice:
    """What a block with this grid runs.

    Parameters
    ----------
    name : str
        ``auto`` or a key of `ATTENTIONS` other than ``reference``.
    device : str
        ``cpu``, ``cuda`` or another type of torch device.
    head_width : int
        Features of one head.
    grid : tuple of int
        Rows and columns of tokens that see each other.
    half : bool
        Whether queries are bfloat16 or float16.
    capability : tuple of int
        CUDA compute capability, (0, 0) where unknown.

    Returns
    -------
    Choice

    Examples
    --------
    >>> choose("auto", "cpu", 64, (64, 64), half=False).name
    'chunked'
    >>> choose("auto", "cuda", 64, (14, 14), half=True, capability=(8, 0))
    Choice(name='augmented', qk_width=96, v_width=96, reason='flash takes one width for all')
    >>> choose("auto", "cuda", 64, (44, 64), half=True, capability=(9, 0)).qk_width
    192
    """
    if name == "auto":
        # On a CPU the fused kernel is ahead in bfloat16 alone: in forward passes, and by a sixth in whole steps over
        # 64 x 64 cells, though not over 44 x 64 nor in windows (benchmarks/attention.py).
        name = "augmented" if device == "cuda" else "chunked"
    if name != "augmented":
        return Choice(name, reason=ATTENTIONS[name].reason)
    needed = head_width + sum(grid)
    width = -(-needed // 8) * 8
    if device == "cpu":
        return Choice(name, width, width, "the CPU's fused kernel takes one width for all")
    if half and width <= _ONE_WIDTH_UP_TO:
        # 92 of a window of 14 becomes 96: multiples of 32 are flash's own tile widths.
        width = -(-width // 32) * 32
        return Choice(name, width, width, "flash takes one width for all")
    if half and capability[0] == _HOPPER and width <= _CUDNN_WIDTHS[0] and head_width <= _CUDNN_WIDTHS[1]:
        return Choice(name, *_CUDNN_WIDTHS, "cuDNN on Hopper takes 192 with 128")
    return Choice(name, width, head_width, "the memory-efficient kernel takes short values beside long keys")
