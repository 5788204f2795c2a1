"""Attention with SAM's decomposed relative positions, exactly, without keeping an N x N matrix for the backward pass.

A score is ``scale q.k + q.R_h[row] + q.R_w[column]``: the positions of ViTDet (Li et al. 2022, arXiv 2203.16527), as
MViTv2 decomposes them (arXiv 2112.01526, section 4.1), taken from the *unscaled* query. Three ways to the same numbers:

- `augmented`: both terms are linear in the query, so that they are columns of a longer query and of a one-hot longer
  key, and one fused `scaled_dot_product_attention` computes all of it (published as FlashBias, NeurIPS 2025);
- `chunked`: a few rows of the score matrix at a time, small enough for the cache, made once more in the backward pass;
- `biased`: the two terms as a full attention mask; the mask is N x N for every head.

Which one runs where is decided in `attention_choice`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_BYTES: Final = 2 * 2**20
"""Of a piece of the score matrix in `chunked`. Between 1 and 4 MiB a step takes the same time (docs/performance.md)."""

_FEWEST_ROWS: Final = 16
_chunk_bytes: ContextVar[int] = ContextVar("chunk_bytes", default=CHUNK_BYTES)


@contextmanager
def pieces_of(n_bytes: int) -> Iterator[None]:
    """Within this context `chunked` works in pieces of this size, at least 16 rows each; its result is the same."""
    token = _chunk_bytes.set(n_bytes)
    try:
        yield
    finally:
        _chunk_bytes.reset(token)


class Positions(NamedTuple):
    """Relative positions of a grid: for every pair of rows (h, h, d), for every pair of columns (w, w, d)."""

    rows: Tensor
    columns: Tensor


def relative_positions(table: Tensor, size: int) -> Tensor:
    """The vectors of all pairs of coordinates along one axis, sliced from a trained table.

    A grid smaller than the one the table was trained on takes the table's middle. (Upstream's `get_rel_pos` would
    stretch the whole table over the smaller grid, which gives every distance another vector.)

    Parameters
    ----------
    table : Tensor, shape (2 L - 1, d)
        Row ``i - j + L - 1`` belongs to query coordinate i and key coordinate j.
    size : int
        At most L.

    Returns
    -------
    Tensor, shape (size, size, d)

    Raises
    ------
    ValueError
        Where the table does not reach that far.

    Examples
    --------
    >>> relative_positions(torch.arange(5.0)[:, None], 2)[..., 0].tolist()
    [[2.0, 1.0], [3.0, 2.0]]
    """
    length = (table.shape[0] + 1) // 2
    if size > length:
        raise ValueError(f"relative positions for {length} cells do not reach over {size}")
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + length - 1]


def chunked(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Attention in pieces, which are computed again in the backward pass.

    Parameters
    ----------
    q, k, v : Tensor of float, shape (n, heads, N, d)
        N = h w tokens of a grid, row by row.
    positions : Positions
        Of that grid.

    Returns
    -------
    Tensor, shape (n, heads, N, d)

    Notes
    -----
    Saved for the backward pass are the arguments alone. In half precision products are formed in half precision, and
    bias and softmax in float32.
    """
    return _Chunked.apply(q, k, v, *positions)


def augmented(q: Tensor, k: Tensor, v: Tensor, positions: Positions, qk_width: int = 0, v_width: int = 0) -> Tensor:
    """Attention by one fused call, the position terms folded into query and key.

    Parameters
    ----------
    q, k, v, positions
        See `chunked`.
    qk_width, v_width : int
        Widths that queries and keys, and values, are padded to with zeros, which changes nothing but which kernels
        accept them; no padding where they are smaller than needed.

    Returns
    -------
    Tensor, shape (n, heads, N, d)
    """
    (h, _, d), w = positions.rows.shape, positions.columns.shape[0]
    by_row, by_column = position_scores(q, positions)
    queries = torch.cat([q * d**-0.5, by_row.to(q.dtype), by_column.to(q.dtype)], dim=-1)
    cells = torch.arange(h * w, device=q.device)
    one_hot = torch.cat(
        [functional.one_hot(cells // w, h).to(k.dtype), functional.one_hot(cells % w, w).to(k.dtype)], dim=-1
    )
    keys = torch.cat([k, one_hot.expand(*k.shape[:2], -1, -1)], dim=-1)
    width = queries.shape[-1]
    if qk_width > width:
        queries = functional.pad(queries, (0, qk_width - width))
        keys = functional.pad(keys, (0, qk_width - width))
    values = functional.pad(v, (0, v_width - d)) if v_width > d else v
    # The query carries the scale already: the kernel must not divide by the root of the longer width.
    if _stand_in.get():
        return _KeptByFused.apply(queries, keys, values)[..., :d]
    return functional.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :d]


def biased(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Attention by one fused call with the position terms as its mask, shape (n, heads, N, N); see `chunked`."""
    by_row, by_column = position_scores(q, positions)
    bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def position_scores(q: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """What relative positions add to the scores, for every key row and for every key column, in float32 or wider.

    Parameters
    ----------
    q : Tensor, shape (..., h w, d)
        Not scaled.
    positions : Positions

    Returns
    -------
    by_row : Tensor, shape (..., h w, h)
    by_column : Tensor, shape (..., h w, w)
    """
    rows, columns = positions
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        grid = q.to(wide).unflatten(-2, (rows.shape[0], columns.shape[0]))
        # One product for each query row, over all its columns and heads; then the same the other way round.
        by_row = torch.einsum("...hwc,hkc->...hwk", grid, rows.to(wide))
        by_column = torch.einsum("...hwc,wkc->...hwk", grid, columns.to(wide))
    return by_row.flatten(-3, -2), by_column.flatten(-3, -2)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, rows, columns)
        with torch.autocast(q.device.type, enabled=False):
            scores = _Scores(q, k, Positions(rows, columns))
            v = v.flatten(0, 1)
            out = torch.empty_like(scores.q)
            for piece in scores.pieces():
                units = piece[0]
                # Named unpacking keeps one row block of all heads of a few windows together.
                torch.bmm(scores.probabilities(piece).to(v.dtype), v[units], out=_at(out, piece))
        return out.unflatten(0, q.shape[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rows, columns = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            found = _backward(q, k, v, Positions(rows, columns), gradient, ctx.needs_input_grad)
        return found


def _backward(
    q: Tensor, k: Tensor, v: Tensor, positions: Positions, gradient: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    scores = _Scores(q, k, positions)
    n_heads, d, wide = q.shape[:2], q.shape[-1], scores.wide
    v, gradient = v.flatten(0, 1), gradient.flatten(0, 1).contiguous()
    grad_q = torch.empty(scores.q.shape, dtype=wide, device=q.device)
    grad_k, grad_v = (torch.zeros(scores.q.shape, dtype=wide, device=q.device) for _ in "kv")
    grad_rows, grad_columns = torch.empty_like(scores.by_row), torch.empty_like(scores.by_column)
    for piece in scores.pieces():
        units = piece[0]
        probabilities = scores.probabilities(piece)
        from_output = _at(gradient, piece)
        _accumulate(grad_v[units], probabilities.to(v.dtype).transpose(1, 2), from_output)
        by_value = torch.bmm(from_output, v[units].transpose(1, 2)).to(wide)
        # Of the fused kernel, one pass in the place of three: P * (dP - sum(dP * P)).
        delta = torch.ops.aten._softmax_backward_data(by_value, probabilities, -1, wide)
        grid = delta.unflatten(-1, scores.grid)
        torch.sum(grid, -1, out=_at(grad_rows, piece))
        torch.sum(grid, -2, out=_at(grad_columns, piece))
        delta = delta.to(q.dtype)
        _at(grad_q, piece).copy_(torch.bmm(delta, scores.k[units]))
        _accumulate(grad_k[units], delta.transpose(1, 2), _at(scores.q, piece))
    # scores.q carries the scale, and so does what went to k; positions were taken from the unscaled query.
    grad_q.mul_(d**-0.5)
    h, w = scores.grid
    rows, columns = (table.to(wide) for table in positions)
    by_row, by_column = grad_rows.unflatten(-2, (h, w)), grad_columns.unflatten(-2, (h, w))
    grad_q += (
        torch.einsum("uhwk,hkc->uhwc", by_row, rows) + torch.einsum("uhwk,wkc->uhwc", by_column, columns)
    ).flatten(1, 2)
    grad_row_table = grad_column_table = None
    if needed[3] or needed[4]:
        plain = q.to(wide).flatten(0, 1).unflatten(1, (h, w))
        grad_row_table = torch.einsum("uhwk,uhwc->hkc", by_row, plain).to(positions.rows.dtype)
        grad_column_table = torch.einsum("uhwk,uhwc->wkc", by_column, plain).to(positions.columns.dtype)
    heads = (g.to(q.dtype).unflatten(0, n_heads) for g in (grad_q, grad_k, grad_v))
    return (*heads, grad_row_table, grad_column_table)


_stand_in: ContextVar[bool] = ContextVar("stand_in", default=False)


@contextmanager
def kept_by_fused_kernels() -> Iterator[None]:
    """Within this context `augmented` computes nothing and keeps what a fused CUDA kernel keeps: for planning."""
    token = _stand_in.set(True)
    try:
        yield
    finally:
        _stand_in.reset(token)


class _KeptByFused(torch.autograd.Function):
    # Arguments, output and one logarithm for each row, as flash and memory-efficient attention do.
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = v.new_empty(v.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


Piece = tuple[slice, slice]


class _Scores:
    """The score matrices of all windows and heads ("units"): pieces of units and query rows, made on demand."""

    def __init__(self, q: Tensor, k: Tensor, positions: Positions) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.grid = positions.rows.shape[0], positions.columns.shape[0]
        self.k = k.flatten(0, 1)
        self.q = (q * q.shape[-1] ** -0.5).flatten(0, 1)
        by_row, by_column = position_scores(q, positions)
        self.by_row, self.by_column = by_row.flatten(0, 1), by_column.flatten(0, 1)

    def pieces(self) -> Iterator[Piece]:
        """Slices of units and of query rows: many whole units where they are small, else rows of one unit."""
        n_units, n_tokens, _ = self.q.shape
        bytes_per_row = n_tokens * self.wide.itemsize
        chunk_bytes = _chunk_bytes.get()
        n_rows = min(n_tokens, max(_FEWEST_ROWS, chunk_bytes // bytes_per_row))
        together = max(1, chunk_bytes // (bytes_per_row * n_rows))
        for unit in range(0, n_units, together):
            for row in range(0, n_tokens, n_rows):
                yield slice(unit, unit + together), slice(row, row + n_rows)

    def probabilities(self, piece: Piece) -> Tensor:
        """Softmax of one piece, shape (units, rows, N)."""
        bias = (_at(self.by_row, piece)[..., :, None] + _at(self.by_column, piece)[..., None, :]).flatten(-2)
        keys = self.k[piece[0]].transpose(1, 2)
        # In float32 the product is added where the bias stands, without a pass of its own.
        _accumulate(bias, _at(self.q, piece), keys)
        return torch.softmax(bias, dim=-1)


def _at(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor[piece[0], piece[1]]


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; the sum is kept in the total's type where the product is in half precision."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)
