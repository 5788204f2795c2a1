"""Attention with SAM's decomposed relative positions, exactly, without keeping an N x N matrix for the backward pass.

A score is ``scale q.k + q.R_h[row] + q.R_w[column]``: the positions of ViTDet (Li et al. 2022, arXiv 2203.16527), as
MViTv2 decomposes them (arXiv 2112.01526, section 4.1), taken from the *unscaled* query. Three ways to the same numbers:

- `augmented`: both terms are linear in the query, so that they are columns of a longer query and of a one-hot longer
  key, and one fused `scaled_dot_product_attention` computes all of it (published as FlashBias, NeurIPS 2025);
- `attention_chunks.chunked`: a few rows of the score matrix at a time, small enough for the cache, made once more in
  the backward pass;
- `biased`: the two terms as a full attention mask; the mask is N x N for every head.

Which one runs where is decided in `attention_choice`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from medsam_lora.models.positions import Positions, folded, position_scores


def augmented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Positions,
    qk_width: int = 0,
    v_width: int = 0,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention by one fused call, the position terms folded into query and key.

    Parameters
    ----------
    q, k, v, positions
        See `attention_chunks.chunked`.
    qk_width, v_width : int
        Widths that queries and keys, and values, are padded to with zeros, which changes nothing but which kernels
        accept them; no padding where they are smaller than needed.
    more : tuple of Tensor, shape (heads, p, d), optional
        Further keys and values under the same softmax, without a place on the grid, the same for every window.

    Returns
    -------
    Tensor, shape (n, heads, N, d)
    """
    d = q.shape[-1]
    queries, keys = folded(q, k, positions)
    width = queries.shape[-1]
    if more is not None:
        more_k, more_v = (t.to(q.dtype).expand(q.shape[0], -1, -1, -1) for t in more)
        # Of no row and no column: what is one-hot in the others is zero.
        keys = torch.cat([keys, functional.pad(more_k, (0, width - d))], dim=-2)
        v = torch.cat([v, more_v], dim=-2)
    if qk_width > width:
        queries = functional.pad(queries, (0, qk_width - width))
        keys = functional.pad(keys, (0, qk_width - width))
    values = functional.pad(v, (0, v_width - d)) if v_width > d else v
    # The query carries the scale already: the kernel must not divide by the root of the longer width.
    if _stand_in:
        return kept_by_fused(queries, keys, values)[..., :d]
    return functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :d]


def biased(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Attention as of `augmented`, by one fused call with the position terms as its mask, shape (n, heads, N, N)."""
    by_row, by_column = position_scores(q, positions)
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


# Of the process: compiled graphs cannot read a context variable.
_stand_in = False


@contextmanager
def planned_for_cuda() -> Iterator[None]:
    """Within this context attention is chosen as on a GPU, is not computed, and keeps what a fused kernel keeps."""
    global _stand_in
    before, _stand_in = _stand_in, True
    try:
        yield
    finally:
        _stand_in = before


def runs_on(tensor: Tensor) -> str:
    """Type of the device that attention is chosen for: the tensor's, or ``cuda`` within `planned_for_cuda`."""
    return "cuda" if _stand_in else tensor.device.type


def kept_by_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A tensor of the output's shape, for which is kept what a fused kernel keeps: arguments, output, a sum a row."""
    out: Tensor = _KeptByFused.apply(q, k, v)
    return out


class _KeptByFused(torch.autograd.Function):
    # Arguments, output and one logarithm for each row, as flash and memory-efficient attention do.
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Not as many rows as there are values: those that an adaptation adds ask nothing.
        out = v.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])
