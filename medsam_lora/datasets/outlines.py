"""Random outlines of objects in the plane: the table `OUTLINES` and the smooth noise they are made with.

An outline is a function of rows ``u``, shape (h, 1) or (h, w), and columns ``v``, shape (1, w) or (h, w), whose value
is positive inside. Objects lie about the origin and reach to about 1 from it; `window` says how far exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.ndimage import label

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]

REACH: Final = 2.0
"""No object reaches further than this from the origin."""

_CELLS = 16


@dataclass(frozen=True)
class PlaneNoise:
    """A smooth periodic random function of the plane: a uniform cubic B-spline with random coefficients.

    Parameters
    ----------
    coefficients : ndarray of float32, shape (n, n)
    step : float
        Distance of neighbouring coefficients.
    """

    coefficients: np.ndarray
    step: float

    @classmethod
    def draw(cls, generator: np.random.Generator, step: float) -> PlaneNoise:
        """Draw noise of mean 0 and standard deviation 1 whose details are about 2 `step` wide."""
        # The weights of a cubic B-spline scale the variance by 0.479 per axis, averaged over positions.
        coefficients = generator.standard_normal((_CELLS, _CELLS), dtype=np.float32) / np.float32(0.479)
        return cls(coefficients, step)

    def at(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Values on a grid of rows `u` and columns `v`, of h and w elements, as (h, w)."""
        return self._weights(u) @ self.coefficients @ self._weights(v).T

    def _weights(self, position: np.ndarray) -> np.ndarray:
        scaled = position.ravel() / self.step
        whole = np.floor(scaled).astype(np.intp)
        t = (scaled - whole).astype(np.float32)
        spline = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        weights = np.zeros((t.size, _CELLS), np.float32)
        rows = np.arange(t.size)
        for shift, values in enumerate(spline):
            weights[rows, (whole + shift) % _CELLS] = values / 6
        return weights


def ellipse(generator: np.random.Generator) -> Outline:
    """An ellipse of any orientation."""
    ratio, angle = generator.uniform(0.35, 1.0), generator.uniform(0, np.pi)
    c, s = np.cos(angle), np.sin(angle)
    return lambda u, v: 1 - np.hypot(c * u + s * v, (c * v - s * u) / ratio)


def blob(generator: np.random.Generator) -> Outline:
    """A disc with a wavy border."""
    noise = PlaneNoise.draw(generator, generator.uniform(0.35, 0.8))
    strength = generator.uniform(0.15, 0.4)
    return lambda u, v: 1 - np.hypot(u, v) + strength * noise.at(u, v)


def cloud(generator: np.random.Generator) -> Outline:
    """A level set of noise: lobes, bays and fingers."""
    noise = PlaneNoise.draw(generator, generator.uniform(0.22, 0.45))
    level = generator.uniform(0.1, 0.6)
    return lambda u, v: noise.at(u, v) + level - 2 * (u * u + v * v)


def polygon(generator: np.random.Generator) -> Outline:
    """A polygon of three to nine corners, seldom convex."""
    corners = int(generator.integers(3, 10))
    angle = np.sort(
        generator.uniform(0, 2 * np.pi)
        + (np.arange(corners) + generator.uniform(0, 0.7, corners)) * 2 * np.pi / corners
    )
    radius = generator.uniform(0.4, 1.0, corners)
    a, b = radius * np.cos(angle), radius * np.sin(angle)

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        odd = np.zeros(np.broadcast_shapes(u.shape, v.shape), bool)
        for k in range(corners):
            a0, b0, a1, b1 = a[k - 1], b[k - 1], a[k], b[k]
            # An edge is crossed by the ray along v from the point.
            odd ^= ((a0 > u) != (a1 > u)) & (v < (b1 - b0) * (u - a0) / (a1 - a0) + b0)
        return odd.astype(np.float32) - 0.5

    return inside


def star(generator: np.random.Generator) -> Outline:
    """Three to nine arms of one length."""
    arms, turn = int(generator.integers(3, 10)), generator.uniform(0, 2 * np.pi)
    depth, sharpness = generator.uniform(0.3, 0.7), generator.uniform(0.6, 2.0)

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        wave = np.abs(np.cos(0.5 * arms * (np.arctan2(u, v) + turn))) ** np.float32(sharpness)
        return 1 - depth + depth * wave - np.hypot(u, v)

    return inside


def lobes(generator: np.random.Generator) -> Outline:
    """Three to eight balls that melt into each other."""
    count = int(generator.integers(3, 9))
    centres = generator.normal(0, 0.45, (count, 2))
    widths = generator.uniform(0.2, 0.5, count)

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        total = np.float32(-0.5) * np.ones(np.broadcast_shapes(u.shape, v.shape), np.float32)
        for (a, b), width in zip(centres, widths, strict=True):
            total += np.exp(-(((u - a) / width) ** 2)) * np.exp(-(((v - b) / width) ** 2))
        return total

    return inside


def crescent(generator: np.random.Generator) -> Outline:
    """A disc with a bite out of it."""
    angle, away, radius = generator.uniform(0, 2 * np.pi), generator.uniform(0.45, 0.9), generator.uniform(0.5, 0.85)
    a, b = away * np.cos(angle), away * np.sin(angle)
    return lambda u, v: np.minimum(1 - np.hypot(u, v), np.hypot(u - a, v - b) - radius)


def branches(generator: np.random.Generator) -> Outline:
    """Tapering arms from a body."""
    count = int(generator.integers(2, 7))
    angles, lengths = generator.uniform(0, 2 * np.pi, count), generator.uniform(0.5, 1.0, count)
    width, body = generator.uniform(0.1, 0.22), generator.uniform(0.2, 0.45)

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        depth = body - np.hypot(u, v)
        for angle, length in zip(angles, lengths, strict=True):
            c, s = np.cos(angle), np.sin(angle)
            along = np.clip(c * u + s * v, 0, length)
            depth = np.maximum(depth, width * (1.2 - along / length) - np.hypot(u - c * along, v - s * along))
        return depth

    return inside


def cell(generator: np.random.Generator) -> Outline:
    """A Voronoi cell: the points nearer to the origin than to any of its neighbours."""
    count = int(generator.integers(5, 10))
    angles = (np.arange(count) + generator.uniform(0, 0.8, count)) * 2 * np.pi / count
    away = generator.uniform(0.7, 1.5, count)

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        depth = np.float32(1.3) - np.hypot(u, v)
        for angle, distance in zip(angles, away, strict=True):
            depth = np.minimum(depth, distance / 2 - np.cos(angle) * u - np.sin(angle) * v)
        return depth

    return inside


OUTLINES: Final[Mapping[str, Callable[[np.random.Generator], Outline]]] = {
    "ellipse": ellipse,
    "blob": blob,
    "cloud": cloud,
    "polygon": polygon,
    "star": star,
    "lobes": lobes,
    "crescent": crescent,
    "branches": branches,
    "cell": cell,
}
"""Every kind of outline; each is drawn equally often."""


def window(outline: Outline, samples: int = 64) -> tuple[float, float, float, float] | None:
    """Bounding box of an outline's largest part in its own frame, (u0, v0, u1, v1), or None where it is empty.

    Examples
    --------
    >>> window(lambda u, v: 1 - np.hypot(u, v), 128)
    (-1.0, -1.0, 1.0, 1.0)
    """
    cell_size = 2 * REACH / samples
    position = ((np.arange(samples) + 0.5) * cell_size - REACH).astype(np.float32)
    inside = largest_part(outline(position[:, None], position[None, :]) > 0)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if rows.size == 0:
        return None
    low_u, high_u = rows[0] * cell_size - REACH, (rows[-1] + 1) * cell_size - REACH
    low_v, high_v = columns[0] * cell_size - REACH, (columns[-1] + 1) * cell_size - REACH
    return float(low_u), float(low_v), float(high_u), float(high_v)


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest component of a mask, of pixels that share an edge, shape (h, w) to (h, w) bool."""
    parts, count = label(mask)
    return mask if count < 2 else parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
