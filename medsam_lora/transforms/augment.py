"""Augmentation of a slice: mirroring left and right, boxes along."""

from __future__ import annotations

from typing import Any

import numpy as np


def flip_left_right(image: Any, mask: Any, boxes: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """Mirror a slice along axis X (left-right on the oriented grid).

    Parameters
    ----------
    image : ndarray or Tensor, shape (..., X, Y)
    mask : ndarray or Tensor, shape (..., X, Y)
    boxes : ndarray of float, shape (n, 4)
        (i0, j0, i1, j1) on voxel edges.

    Returns
    -------
    image, mask, boxes
        New arrays; applied twice they are the input.

    Examples
    --------
    >>> image = np.array([[1, 2], [3, 4], [5, 6]])
    >>> flipped, _, boxes = flip_left_right(image, image > 4, np.array([[2.0, 0, 3, 2]]))
    >>> flipped.tolist(), boxes.tolist()
    ([[5, 6], [3, 4], [1, 2]], [[0.0, 0.0, 1.0, 2.0]])
    """
    n = image.shape[-2]
    mirrored = boxes.copy()
    # Edge i stands at n - i afterwards, so the two edges of an axis change places.
    mirrored[:, 0], mirrored[:, 2] = n - boxes[:, 2], n - boxes[:, 0]
    return _flipped(image), _flipped(mask), mirrored


def random_flip(
    image: Any, mask: Any, boxes: np.ndarray, generator: np.random.Generator, probability: float = 0.5
) -> tuple[Any, Any, np.ndarray]:
    """`flip_left_right` with some probability.

    Parameters
    ----------
    image, mask, boxes
        As `flip_left_right` takes them.
    generator : Generator
        One number is drawn from it in any case.
    probability : float
    """
    if generator.random() < probability:
        return flip_left_right(image, mask, boxes)
    return image, mask, boxes


def _flipped(array: Any) -> Any:
    if isinstance(array, np.ndarray):
        # A copy: torch cannot take over a view with negative strides.
        return np.ascontiguousarray(np.flip(array, -2))
    return array.flip((-2,))
