"""The surface of a mask by marching cubes: which cell of 2 x 2 x 2 voxels holds how much of it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Which of the eight voxels around every lattice point are set, one bit each.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)

    Returns
    -------
    ndarray of uint8, shape (X + 1, Y + 1, Z + 1)
        Bit ``7 - (4 a + 2 b + c)`` is that of the voxel ``(i - 1 + a, j - 1 + b, k - 1 + c)``.
    """
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    voxels = mask.view(np.uint8) if mask.flags.c_contiguous else mask.astype(np.uint8)
    for bit in range(8):
        a, b, c = 1 - (bit >> 2 & 1), 1 - (bit >> 1 & 1), 1 - (bit & 1)
        shifted = tuple(slice(1 - s, 1 - s + n) for s, n in zip((a, b, c), mask.shape, strict=True))
        codes[shifted] |= voxels << np.uint8(bit)
    return codes


@lru_cache(maxsize=64)
def surface_areas(x_mm: float, y_mm: float, z_mm: float) -> np.ndarray:
    """Area of the marching-cubes surface in a cell of 2 x 2 x 2 voxel centres, for all 256 neighbour codes.

    The surface cuts every edge between a set and an unset corner in its middle. Corners joined by edges have one
    piece around them, the others their own; more than four corners have the surface of the unset ones.

    Parameters
    ----------
    x_mm, y_mm, z_mm : float
        Edges of the cell: the voxel spacing.

    Returns
    -------
    ndarray of float64, shape (256,)
        In mm², read-only.

    Examples
    --------
    >>> flat = 0b11110000  # the four voxels of lower x
    >>> float(surface_areas(2.0, 3.0, 5.0)[flat])
    15.0
    """
    faces = np.array([y_mm * z_mm, x_mm * z_mm, x_mm * y_mm])
    areas = np.zeros(256)
    for code in range(256):
        corners = {(7 - bit >> 2 & 1, 7 - bit >> 1 & 1, 7 - bit & 1) for bit in range(8) if code >> bit & 1}
        if len(corners) > 4:
            corners = {tuple(map(int, corner)) for corner in np.ndindex(2, 2, 2)} - corners  # type: ignore[assignment]
        areas[code] = sum(
            float(np.linalg.norm(faces * normal)) for piece in _joined(corners) for normal in _normals(piece)
        )
    areas.setflags(write=False)
    return areas


_Corner = tuple[int, int, int]


def _joined(corners: set[_Corner]) -> list[list[_Corner]]:
    """Corners of a cell grouped into those that edges join."""
    left, groups = set(corners), []
    while left:
        group = [left.pop()]
        for corner in group:
            touching = {other for other in left if np.abs(np.subtract(corner, other)).sum() == 1}
            group += sorted(touching)
            left -= touching
        groups.append(group)
    return groups


def _normals(piece: list[_Corner]) -> list[np.ndarray]:
    """Normals of the planar parts of the surface around joined corners, as shares of the cell's three faces.

    The length of a normal in a cell of spacing (x, y, z), after multiplication with the faces (yz, xz, xy), is the
    part's area; signs do not matter for it. Obtained by cutting the polygon of edge middles into planar parts.
    """
    along = [np.abs(np.subtract(a, b)) for i, a in enumerate(piece) for b in piece[:i]]
    edges = [step for step in along if step.sum() == 1]
    equal = np.ones(3)
    if len(piece) == 1:  # a triangle that cuts the corner off
        return [equal / 8]
    if len(piece) == 2:  # a rectangle along the edge
        return [(equal - edges[0]) / 2]
    flat = equal - np.any(edges, axis=0)
    if len(piece) == 3:  # an L in a face: half that face, and a trapezium across the cell
        return [flat / 2, equal * 3 / 8]
    if flat.any():  # four in a face
        return [flat]
    degrees = [sum(int(np.abs(np.subtract(a, b)).sum()) == 1 for b in piece) for a in piece]
    if max(degrees) == 3:
        # A corner and its three neighbours: a hexagon. In four triangles, as marching cubes has it, so that sums round
        # as they do elsewhere: a percentile may lie exactly between two elements.
        return [equal / 8, equal / 4, equal / 4, equal / 8]
    # A path along all three axes: a quadrilateral across the cell, and a triangle at either end of the path.
    one, other = (corner for corner, degree in zip(piece, degrees, strict=True) if degree == 2)
    middle = np.abs(np.subtract(one, other))
    ends = [np.eye(3)[axis] for axis in range(3) if not middle[axis]]
    return [equal / 2, *((middle + end) / 4 for end in ends)]
