"""The z-score: its statistics, stored beside raw voxels, and its application at load.

Voxels are stored as the file has them, so the store is lossless and a slice travels to the device as int16; the
same function normalises numpy arrays and torch tensors there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from medsam_lora.transforms.orientation import in_memory_order

Array = TypeVar("Array")

# Voxels looked at in one go.
_PIECE = 2**18

CountedVoxels = Callable[[Any], Any]
"""raw voxels (numpy or torch) to a mask of those that count."""


def nonzero_voxels(raw: Any) -> Any:
    """Voxels other than 0: the brain of a skull-stripped image."""
    return raw != 0


def all_voxels(raw: Any) -> Any:
    """Every voxel that is a number."""
    return raw == raw  # False for NaN alone, in numpy and torch alike


def statistics(image: np.ndarray, voxels: str, scope: str, slices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every slice and modality, in float64 over the finite voxels that count.

    Parameters
    ----------
    image : ndarray, shape (M, X, Y, Z)
        The whole volume, before the crop.
    voxels : str
        A key of `transforms.NORMALISATIONS`: the voxels that count.
    scope : str
        ``volume``: one mean per modality, the same for all slices; ``slice``: one per slice and modality.
    slices : sequence of int, length N
        Indices along Z.

    Returns
    -------
    mean, std : ndarray of float64, shape (N, M)
        The deviation is that of the population (divided by n). Where no voxel counts the mean is 0; where all are
        equal the deviation is 1, so that the z-score is 0 and not a division by zero.

    Examples
    --------
    >>> mean, std = statistics(np.array([[[[0, 0], [1, 7], [3, 7]]]]), "nonzero", "slice", [0, 1])
    >>> mean.tolist(), std.tolist()
    ([[2.0], [7.0]], [[1.0], [1.0]])
    """
    counted = _counted(voxels)
    if not len(slices):
        return np.zeros((0, len(image))), np.zeros((0, len(image)))
    if scope == "volume":
        pairs = [_mean_std(channel, counted) for channel in image]
        whole = np.array(pairs, np.float64).reshape(1, -1, 2).repeat(len(slices), axis=0)
        return whole[..., 0].copy(), whole[..., 1].copy()
    if scope != "slice":
        raise ValueError(f"scope must be volume or slice, not {scope!r}")
    each = [[_mean_std(channel[..., k], counted) for channel in image] for k in slices]
    table = np.array(each, np.float64).reshape(len(slices), len(image), 2)
    return table[..., 0].copy(), table[..., 1].copy()


def _mean_std(voxels: np.ndarray, counted: CountedVoxels) -> tuple[float, float]:
    small = voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2
    n, mean, std = (_exact_moments if small else _moments)(_counted_pieces(voxels, counted))
    # Equal float voxels may leave a deviation of rounding errors, which would blow them up to +-1.
    return (mean, std if std > 1e-12 * abs(mean) else 1.0) if n else (0.0, 1.0)


def _counted_pieces(voxels: np.ndarray, counted: CountedVoxels) -> Iterator[np.ndarray]:
    """The finite voxels that count, as float64: one pass over the volume, in pieces that stay in the cache."""
    flat = in_memory_order(voxels).reshape(-1)
    for first in range(0, flat.size, _PIECE):
        piece = flat[first : first + _PIECE]
        values = piece[counted(piece)]
        if values.dtype.kind == "f":
            values = values[np.isfinite(values)]
        if values.size:
            # A float32 sum of a million voxels is off in the fourth digit.
            yield values.astype(np.float64)


def _exact_moments(pieces: Iterable[np.ndarray]) -> tuple[int, float, float]:
    """Number, mean and deviation of integers of 16 bits: sums and squares of a piece stay below 2^53, so are exact."""
    n = total = squares = 0
    for values in pieces:
        n += values.size
        total += int(values.sum())
        squares += int(values @ values)
    return (n, total / n, math.sqrt((n * squares - total * total) / (n * n))) if n else (0, 0.0, 0.0)


def _moments(pieces: Iterable[np.ndarray]) -> tuple[int, float, float]:
    """Number, mean and deviation; the moments of two pieces add up as in Chan, Golub and LeVeque 1979 (eq. 2.1)."""
    n, mean, squares = 0, 0.0, 0.0
    for values in pieces:
        own = float(values.mean())
        values -= own
        total, shift = n + values.size, own - mean
        squares += float(values @ values) + shift * shift * n * values.size / total
        mean += shift * values.size / total
        n = total
    return (n, mean, math.sqrt(squares / n)) if n else (0, 0.0, 0.0)


def zscore(raw: Array, mean: Any, std: Any, voxels: str) -> Array:
    """Normalise raw voxels: ``(raw - mean) / std`` where they count, exactly 0 elsewhere.

    Parameters
    ----------
    raw : ndarray or Tensor, shape (..., M, X, Y)
        Any number type. Voxels that are not finite become 0.
    mean, std : ndarray or Tensor, shape (..., M)
    voxels : str
        A key of `transforms.NORMALISATIONS`: the voxels that count.

    Returns
    -------
    ndarray of float32 or Tensor of float32, shape (..., M, X, Y)
        On the device of `raw`.

    Examples
    --------
    >>> zscore(np.array([[[0, 3, 5]]], np.int16), np.array([3.0]), np.array([2.0]), "nonzero").tolist()
    [[[0.0, 0.0, 1.0]]]
    """
    counted = _counted(voxels)
    if isinstance(raw, np.ndarray):
        return _zscore(np, raw, mean, std, counted, {})
    import torch

    return _zscore(torch, raw, mean, std, counted, {"device": raw.device})  # type: ignore[attr-defined]


def _zscore(xp: Any, raw: Any, mean: Any, std: Any, counted: CountedVoxels, where: dict[str, Any]) -> Any:
    values = xp.asarray(raw, dtype=xp.float32)
    centre, width = (xp.asarray(a, dtype=xp.float32, **where)[..., None, None] for a in (mean, std))
    keep = counted(raw) & xp.isfinite(values)
    return xp.where(keep, (values - centre) / width, xp.zeros_like(values))


def _counted(voxels: str) -> CountedVoxels:
    # The package's table is complete only after this module, which it lists.
    from medsam_lora.transforms import NORMALISATIONS

    return NORMALISATIONS[voxels]
