"""Attention inside many windows with a dense bias, in pieces that stay in the cache, computed once more backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from medsam_lora.models.attention_chunks import piece_bytes

PIECE_BYTES: Final = 2 * 2**20
"""Of the scores of a piece."""


def windowed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention with an additive bias, ``softmax(q k^T / sqrt(d) + bias) v``, window by window.

    Parameters
    ----------
    q, k, v : Tensor of float, shape (n, heads, N, d)
        Of n windows.
    bias : Tensor of float, shape (heads, N, N)

    Returns
    -------
    Tensor, shape (n, heads, N, d)

    Notes
    -----
    Saved for the backward pass are the arguments alone. In half precision the bias is added before the scores are
    rounded, and softmax sums in float32.
    """
    return run_pieces(q, k, v, bias)


def run_pieces(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """What `windowed` calls; `compiling.compiled_blocks` puts the same in its place, kept out of compiled graphs."""
    return _Windowed.apply(q, k, v, bias)


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            own = bias.to(q.dtype)
            for piece in _pieces(q):
                probabilities = _probabilities(_units(q[piece]), _units(k[piece]), own)
                torch.bmm(probabilities, _units(v[piece]), out=_units(out[piece]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        scale = q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, enabled=False):
            own = bias.to(q.dtype)
            for piece in _pieces(q):
                # Laid out once, as most of them are read twice.
                queries, keys, values, from_output = (_units(t[piece]) for t in (q, k, v, gradient))
                grad_q, grad_k, grad_v = (_units(g[piece]) for g in grads)
                probabilities = _probabilities(queries, keys, own)
                torch.bmm(probabilities.transpose(1, 2), from_output, out=grad_v)
                by_value = torch.bmm(from_output, values.transpose(1, 2))
                # Of the fused kernel, one pass in the place of three: P * (dP - sum(dP * P)).
                delta = torch.ops.aten._softmax_backward_data(by_value, probabilities, -1, q.dtype)
                if grad_bias is not None:
                    grad_bias += delta.unflatten(0, (-1, bias.shape[0])).sum(0, dtype=grad_bias.dtype)
                torch.bmm(delta, keys, out=grad_q).mul_(scale)
                torch.bmm(delta.transpose(1, 2), queries, out=grad_k).mul_(scale)
        return (*grads, grad_bias)


def _probabilities(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Softmax of some windows' scores, shape (windows * heads, N, N)."""
    # Copies: an expanded bias would be written into where a piece is one window.
    scores = bias.repeat(queries.shape[0] // bias.shape[0], 1, 1)
    # The product is added where the bias stands, without a pass of its own.
    return scores.baddbmm_(queries, keys.transpose(1, 2), alpha=queries.shape[-1] ** -0.5).softmax(dim=-1)


def _units(part: Tensor) -> Tensor:
    """Windows and their heads on one axis: a view where they are laid out so, else a copy."""
    return part.flatten(0, 1)


def _pieces(q: Tensor) -> Iterator[slice]:
    n, heads, cells, _ = q.shape
    together = max(1, piece_bytes(PIECE_BYTES) // (heads * cells * cells * q.itemsize))
    for first in range(0, n, together):
        yield slice(first, first + together)
