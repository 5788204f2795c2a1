"""SAM's decomposed relative positions: a vector for every pair of coordinates along an axis, and their scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


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


def folded(q: Tensor, k: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Queries and keys whose plain product is the scaled score with its positions.

    Both position terms are linear in the query, so that they are columns of a longer query and of a one-hot longer key
    (published as FlashBias, NeurIPS 2025). The query carries the scale.

    Parameters
    ----------
    q, k : Tensor of float, shape (n, heads, N, d)
    positions : Positions

    Returns
    -------
    queries, keys : Tensor, shape (n, heads, N, d + h + w)
    """
    (h, _, d), w = positions.rows.shape, positions.columns.shape[0]
    by_row, by_column = position_scores(q, positions)
    queries = torch.cat([q * d**-0.5, by_row.to(q.dtype), by_column.to(q.dtype)], dim=-1)
    cells = torch.arange(h * w, device=q.device)
    one_hot = torch.cat(
        [functional.one_hot(cells // w, h).to(k.dtype), functional.one_hot(cells % w, w).to(k.dtype)], dim=-1
    )
    return queries, torch.cat([k, one_hot.expand(*k.shape[:2], -1, -1)], dim=-1)
