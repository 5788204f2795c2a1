"""Attention in pieces of the score matrix that stay in the cache, computed once more in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from medsam_lora.models.positions import Positions, folded, position_scores

CHUNK_BYTES: Final = 2 * 2**20
"""Of a piece of the score matrix in float32. Between 1 and 4 MiB a step takes the same time (docs/performance.md)."""
HALF_BYTES: Final = 4 * 2**20
"""The same in half precision."""
_FOLDED_BYTES: Final = 16 * 2**20

_FEWEST_ROWS: Final = 16
# Of the process, not of a thread or task: what is set here changes no result, and compiled graphs cannot read a
# context variable.
_chunk_bytes = 0

Piece = tuple[slice, slice]


@contextmanager
def pieces_of(n_bytes: int) -> Iterator[None]:
    """Within this context `chunked` (at least 16 rows each) and `windowed` work in pieces of this size."""
    global _chunk_bytes
    before, _chunk_bytes = _chunk_bytes, n_bytes
    try:
        yield
    finally:
        _chunk_bytes = before


def piece_bytes(usual: int) -> int:
    """What a piece takes now: `usual`, or what `pieces_of` says."""
    return _chunk_bytes or usual


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
    Saved for the backward pass are the arguments alone. In half precision the positions are folded into queries and
    keys (`positions.folded`), so that one product gives the scores, rounded once; softmax sums in float32. A pass over
    the scores costs more there than the longer product.
    """
    return run_pieces(q, k, v, positions)


def run_pieces(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """What `chunked` calls; `compiling.compiled_blocks` puts the same in its place, kept out of compiled graphs."""
    way = _ChunkedHalf if q.itemsize == 2 else _Chunked
    return way.apply(q, k, v, *positions)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, rows, columns)
        with torch.autocast(q.device.type, enabled=False):
            scores = _Scores(q, k, Positions(rows, columns))
            v = v.flatten(0, 1)
            out = torch.empty_like(scores.q)
            for piece in _pieces(scores.by_row, CHUNK_BYTES):
                units = piece[0]
                torch.bmm(scores.probabilities(piece), v[units], out=_at(out, piece))
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
    n_heads = q.shape[:2]
    v, gradient = v.flatten(0, 1), gradient.flatten(0, 1).contiguous()
    grad_q = torch.empty_like(scores.q)
    grad_k, grad_v = (torch.zeros_like(scores.q) for _ in "kv")
    grad_rows, grad_columns = torch.empty_like(scores.by_row), torch.empty_like(scores.by_column)
    for piece in _pieces(scores.by_row, CHUNK_BYTES):
        units = piece[0]
        probabilities = scores.probabilities(piece)
        from_output = _at(gradient, piece)
        grad_v[units].baddbmm_(probabilities.transpose(1, 2), from_output)
        by_value = torch.bmm(from_output, v[units].transpose(1, 2))
        # Of the fused kernel, one pass in the place of three: P * (dP - sum(dP * P)).
        delta = torch.ops.aten._softmax_backward_data(by_value, probabilities, -1, q.dtype)
        grid = delta.unflatten(-1, scores.grid)
        torch.sum(grid, -1, out=_at(grad_rows, piece))
        torch.sum(grid, -2, out=_at(grad_columns, piece))
        torch.bmm(delta, scores.k[units], out=_at(grad_q, piece))
        grad_k[units].baddbmm_(delta.transpose(1, 2), _at(scores.q, piece))
    return _gathered(grad_q, grad_k, grad_v, grad_rows, grad_columns, q, positions, needed, n_heads)


class _ChunkedHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, rows, columns)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(q, Positions(rows, columns)):
                _forward_half(q[part], k[part], v[part], Positions(rows, columns), out[part])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rows, columns = ctx.saved_tensors
        positions = Positions(rows, columns)
        heads = [torch.empty_like(q, memory_format=torch.contiguous_format) for _ in "qkv"]
        tables: list[Tensor | None] = [None, None]
        with torch.autocast(q.device.type, enabled=False):
            for part in _parts(q, positions):
                found = _backward_half(q[part], k[part], v[part], positions, gradient[part], ctx.needs_input_grad)
                for whole, own in zip(heads, found[:3], strict=True):
                    assert own is not None  # tables alone may have none
                    whole[part] = own
                tables = [
                    own if whole is None or own is None else whole + own
                    for whole, own in zip(tables, found[3:], strict=True)
                ]
        return (*heads, *tables)


def _parts(q: Tensor, positions: Positions) -> Iterator[slice]:
    """Windows or images whose folded queries and keys are there at a time: those of a whole batch would be its peak."""
    width = q.shape[-1] + positions.rows.shape[0] + positions.columns.shape[0]
    together = max(1, _FOLDED_BYTES // (q[0].numel() // q.shape[-1] * width * q.itemsize))
    for first in range(0, q.shape[0], together):
        yield slice(first, first + together)


def _forward_half(q: Tensor, k: Tensor, v: Tensor, positions: Positions, out: Tensor) -> None:
    queries, keys = (t.flatten(0, 1) for t in folded(q, k, positions))
    # Laid out once: half-precision products copy what is transposed, for every piece anew.
    keys_t, v, out = keys.transpose(1, 2).contiguous(), v.flatten(0, 1), out.flatten(0, 1)
    for piece in _pieces(queries, HALF_BYTES):
        units = piece[0]
        probabilities = torch.bmm(_at(queries, piece), keys_t[units]).softmax(dim=-1)
        torch.bmm(probabilities, v[units], out=_at(out, piece))


def _backward_half(
    q: Tensor, k: Tensor, v: Tensor, positions: Positions, gradient: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    n_heads, d = q.shape[:2], q.shape[-1]
    queries, keys = (t.flatten(0, 1) for t in folded(q, k, positions))
    v, gradient = v.flatten(0, 1), gradient.flatten(0, 1).contiguous()
    scaled = queries[..., :d].contiguous()
    keys_t, v_t = (t.transpose(1, 2).contiguous() for t in (keys, v))
    from_queries = torch.empty_like(queries)
    # Sums over many pieces, which half precision would lose.
    grad_k, grad_v = (torch.zeros(v.shape, dtype=torch.float32, device=v.device) for _ in "kv")
    for piece in _pieces(queries, HALF_BYTES):
        units = piece[0]
        from_output = _at(gradient, piece)
        probabilities = torch.bmm(_at(queries, piece), keys_t[units]).softmax(dim=-1)
        grad_v[units] += torch.bmm(probabilities.transpose(1, 2), from_output)
        by_value = torch.bmm(from_output, v_t[units])
        delta = torch.ops.aten._softmax_backward_data(by_value, probabilities, -1, q.dtype)
        # The one-hot columns of the keys sum over rows and columns of the grid.
        torch.bmm(delta, keys[units], out=_at(from_queries, piece))
        grad_k[units] += torch.bmm(delta.transpose(1, 2), _at(scaled, piece))
    h, w = positions.rows.shape[0], positions.columns.shape[0]
    grad_q, grad_rows, grad_columns = from_queries.float().split([d, h, w], dim=-1)
    return _gathered(grad_q, grad_k, grad_v, grad_rows, grad_columns, q, positions, needed, n_heads)


def _gathered(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_rows: Tensor,
    grad_columns: Tensor,
    q: Tensor,
    positions: Positions,
    needed: tuple[bool, ...],
    n_heads: tuple[int, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and both position tables from those of the scaled query and of the position scores."""
    (h, _, d), w = positions.rows.shape, positions.columns.shape[0]
    # What the scores were made of carries the scale, and so does what went to k; positions are of the unscaled query.
    grad_q.mul_(d**-0.5)
    rows, columns = (table.to(grad_q.dtype) for table in positions)
    by_row, by_column = grad_rows.unflatten(-2, (h, w)), grad_columns.unflatten(-2, (h, w))
    grad_q += (
        torch.einsum("uhwk,hkc->uhwc", by_row, rows) + torch.einsum("uhwk,wkc->uhwc", by_column, columns)
    ).flatten(1, 2)
    grad_row_table = grad_column_table = None
    if needed[3] or needed[4]:
        plain = q.to(grad_q.dtype).flatten(0, 1).unflatten(1, (h, w))
        grad_row_table = torch.einsum("uhwk,uhwc->hkc", by_row, plain).to(positions.rows.dtype)
        grad_column_table = torch.einsum("uhwk,uhwc->wkc", by_column, plain).to(positions.columns.dtype)
    heads = (g.to(q.dtype).unflatten(0, n_heads) for g in (grad_q, grad_k, grad_v))
    return (*heads, grad_row_table, grad_column_table)


class _Scores:
    """The score matrices of all windows and heads ("units"): pieces of units and query rows, made on demand."""

    def __init__(self, q: Tensor, k: Tensor, positions: Positions) -> None:
        self.grid = positions.rows.shape[0], positions.columns.shape[0]
        self.k = k.flatten(0, 1)
        self.q = (q * q.shape[-1] ** -0.5).flatten(0, 1)
        by_row, by_column = position_scores(q, positions)
        self.by_row, self.by_column = by_row.flatten(0, 1), by_column.flatten(0, 1)

    def probabilities(self, piece: Piece) -> Tensor:
        """Softmax of one piece, shape (units, rows, N)."""
        bias = (_at(self.by_row, piece)[..., :, None] + _at(self.by_column, piece)[..., None, :]).flatten(-2)
        keys = self.k[piece[0]].transpose(1, 2)
        # The product is added where the bias stands, without a pass of its own.
        return bias.baddbmm_(_at(self.q, piece), keys).softmax(dim=-1)


def _pieces(units: Tensor, n_bytes: int) -> Iterator[Piece]:
    """Slices of units and of query rows: many whole units where they are small, else rows of one unit.

    `units` has the shape (units, N, ...); a row of scores is N numbers of its type.
    """
    n_units, n_tokens = units.shape[:2]
    bytes_per_row = n_tokens * units.itemsize
    chunk_bytes = piece_bytes(n_bytes)
    n_rows = min(n_tokens, max(_FEWEST_ROWS, chunk_bytes // bytes_per_row))
    together = max(1, chunk_bytes // (bytes_per_row * n_rows))
    for unit in range(0, n_units, together):
        for row in range(0, n_tokens, n_rows):
            yield slice(unit, unit + together), slice(row, row + n_rows)


def _at(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor[piece[0], piece[1]]
