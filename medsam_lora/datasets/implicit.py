"""Implicit solids: functions of points whose value is a depth, the signed distance in mm, positive inside.

Points are three arrays of coordinates, of one shape; all is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ellipsoid(
    p: Sequence[np.ndarray], centre: Sequence[float], radii: Sequence[float], power: float = 2.0
) -> np.ndarray:
    """Depth inside a (super)ellipsoid: its norm over the length of the norm's gradient, exact at the surface."""
    total = np.zeros_like(p[0])
    slope = np.zeros_like(p[0])
    for axis in range(3):
        relative = np.abs(p[axis] - np.float32(centre[axis])) / np.float32(radii[axis]) + np.float32(1e-6)
        raised = relative ** np.float32(power - 1) if power != 2.0 else relative
        total = total + raised * relative
        slope = slope + (raised / np.float32(radii[axis])) ** 2
    norm = total ** np.float32(1 / power)
    # d(norm) = norm^(1 - power) * raised / radius per axis.
    return (1 - norm) * norm ** np.float32(power - 1) / np.sqrt(slope)


def capsule(
    p: Sequence[np.ndarray], start: Sequence[float], end: Sequence[float], first_mm: float, last_mm: float
) -> np.ndarray:
    """Depth inside a tube whose radius goes from `first_mm` at `start` to `last_mm` at `end`.

    Parameters
    ----------
    p : sequence of ndarray
        Coordinates of the points along each axis, in mm.
    start, end : sequence of float, (x, y, z)
        Ends of the tube's axis, in mm.
    first_mm, last_mm : float
    """
    a, b = np.asarray(start, np.float32), np.asarray(end, np.float32)
    along = b - a
    share = sum((p[axis] - a[axis]) * along[axis] for axis in range(3)) / np.float32(along @ along)
    share = np.clip(share, 0, 1)
    squared = sum((p[axis] - a[axis] - share * along[axis]) ** 2 for axis in range(3))
    return np.float32(first_mm) + share * np.float32(last_mm - first_mm) - np.sqrt(squared)


def smooth_max(a: np.ndarray, b: np.ndarray, width_mm: float) -> np.ndarray:
    """Maximum with a fillet of `width_mm` (the quadratic polynomial of constructive solid geometry)."""
    fillet = np.maximum(width_mm - np.abs(a - b), 0) / np.float32(width_mm)
    return np.maximum(a, b) + fillet * fillet * np.float32(width_mm / 4)


def step(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a smooth cubic between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def ramp(depth: np.ndarray, width_mm: float) -> np.ndarray:
    """Share of a voxel of that width that lies inside."""
    return np.clip(depth / np.float32(width_mm) + np.float32(0.5), 0, 1)


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix from angles about the three axes, in radians, shape (3,) to (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix
