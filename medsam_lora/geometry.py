"""Where an array stands in the patient: shape and affine, and the exact way from one grid to another.

One frame convention: arrays are indexed as nibabel returns them, affines map voxel *centres* to RAS+ millimetres.
A box is given on voxel *edges*, half-open: voxel ``i`` reaches from edge ``i`` to edge ``i + 1``, so a box
``(0, 3)`` covers three voxels. Every spatial step of the package returns the array with a new `Geometry`; the way
back to the native grid is one call of `place` between two geometries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two grids are taken as the same where no voxel is displaced by more than this share of a voxel.
GRID_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Geometry:
    """Shape of a grid and its placement in world space.

    Parameters
    ----------
    shape : tuple of int, (X, Y, Z)
    affine : ndarray of float64, shape (4, 4)
        Voxel-centre index to RAS+ mm.

    Examples
    --------
    >>> g = Geometry((4, 5, 6), np.diag([2.0, 2.0, 3.0, 1.0]))
    >>> g.spacing_mm, g.axis_codes, g.voxel_volume_ml
    ((2.0, 2.0, 3.0), ('R', 'A', 'S'), 0.012)
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        affine = np.array(self.affine, np.float64)
        if len(shape) != 3 or affine.shape != (4, 4):
            raise ValueError(f"a Geometry needs three axes and a 4x4 affine, not {shape} and {affine.shape}")
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxel centres along each array axis, in mm."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(x), float(y), float(z)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def axis_codes(self) -> tuple[str, str, str]:
        """The anatomical direction in which each array axis grows, such as ``('L', 'P', 'S')``."""
        import nibabel as nib

        a, b, c = nib.orientations.aff2axcodes(self.affine)
        return a, b, c

    @property
    def is_orthogonal(self) -> bool:
        """Whether the axes are at right angles; ITK and 3D Slicer refuse a sheared affine."""
        unit = self.affine[:3, :3] / np.array(self.spacing_mm)
        return bool(np.allclose(unit.T @ unit, np.eye(3), atol=1e-3))

    def world(self, index: np.ndarray | Sequence[float]) -> np.ndarray:
        """RAS+ mm of voxel-centre indices, shape (..., 3) to (..., 3)."""
        return np.asarray(index, np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def index(self, world: np.ndarray | Sequence[float]) -> np.ndarray:
        """Fractional voxel-centre indices of RAS+ mm points, shape (..., 3) to (..., 3)."""
        return (np.asarray(world, np.float64) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def matches(self, other: Geometry, tolerance: float = GRID_TOLERANCE) -> bool:
        """Whether both grids have the same shape and no voxel displaced by more than `tolerance` voxels."""
        return self.shape == other.shape and self.displacement_voxels(other) <= tolerance

    def displacement_voxels(self, other: Geometry) -> float:
        """Largest distance between equal indices of the two grids, in voxels of this one."""
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape])).reshape(3, -1).T
        return float(np.abs(self.index(other.world(corners)) - corners).max())

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Geometry:
        """The grid of ``array[start[0]:stop[0], ...]``; negative starts and stops past the end mean padding.

        Examples
        --------
        >>> Geometry((4, 4, 4), np.eye(4)).cropped((1, 0, 3), (3, 4, 4)).affine[:3, 3].tolist()
        [1.0, 0.0, 3.0]
        """
        affine = self.affine.copy()
        affine[:3, 3] = self.world(start)
        x, y, z = (int(b) - int(a) for a, b in zip(start, stop, strict=True))
        return Geometry((x, y, z), affine)

    def at_slice(self, k: int) -> Geometry:
        """The geometry, of depth 1, of the transverse slice ``array[:, :, k]``."""
        x, y, _ = self.shape
        return self.cropped((0, 0, k), (x, y, k + 1))

    def to_json(self) -> dict:
        """Plain data, from which `from_json` rebuilds an equal geometry bit for bit."""
        return {"shape": list(self.shape), "affine": self.affine.tolist()}

    @classmethod
    def from_json(cls, data: dict) -> Geometry:
        """The geometry that `to_json` described."""
        x, y, z = data["shape"]
        return cls((x, y, z), np.array(data["affine"], np.float64))


@dataclass(frozen=True)
class AxisMap:
    """An exact map between two grids: axis permutation, flips, and whole-voxel shifts.

    Index ``i`` along source axis ``a`` stands at ``sign[a] * i + offset[a]`` along target axis ``axes[a]``.
    """

    axes: tuple[int, int, int]
    sign: tuple[int, int, int]
    offset: tuple[int, int, int]


def axis_map(source: Geometry, target: Geometry, tolerance: float = GRID_TOLERANCE) -> AxisMap | None:
    """The exact map from `source` to `target`, or None where their voxels do not coincide.

    Examples
    --------
    >>> lps = Geometry((3, 4, 5), np.array([[-1, 0, 0, 2], [0, -1, 0, 3], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    >>> axis_map(lps, Geometry((3, 4, 5), np.eye(4)))
    AxisMap(axes=(0, 1, 2), sign=(-1, -1, 1), offset=(2, 3, 0))
    """
    matrix = np.linalg.inv(target.affine) @ source.affine
    axes = np.abs(matrix[:3, :3]).argmax(axis=0)
    if sorted(axes.tolist()) != [0, 1, 2]:
        return None
    sign = np.sign(matrix[axes, [0, 1, 2]]).astype(int)
    offset = np.rint(matrix[axes, 3]).astype(int)
    exact = np.zeros((3, 4))
    exact[axes, [0, 1, 2]] = sign
    exact[axes, 3] = offset
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in source.shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    if np.abs(matrix[:3] @ corners - exact @ corners).max() > tolerance:
        return None
    a, s, o = axes.tolist(), sign.tolist(), offset.tolist()
    return AxisMap((a[0], a[1], a[2]), (s[0], s[1], s[2]), (o[0], o[1], o[2]))


def place(array: np.ndarray, source: Geometry, target: Geometry, *, fill: float = 0, order: int = 0) -> np.ndarray:
    """Put an array on another grid.

    Exact (no interpolation) where the voxels of the two grids coincide, which holds for every crop, flip and axis
    permutation; otherwise a resampling of the given order. Voxels outside the source become `fill`.

    Parameters
    ----------
    array : ndarray, shape source.shape
    source, target : Geometry
    fill : float
    order : int
        Spline order of the resampling, 0 (nearest) for masks and label maps.

    Returns
    -------
    ndarray, shape target.shape, dtype of `array`
    """
    if array.shape != source.shape:
        raise ValueError(f"array of shape {array.shape} does not stand on a grid of shape {source.shape}")
    exact = axis_map(source, target)
    if exact is None:
        from scipy.ndimage import affine_transform

        matrix = np.linalg.inv(source.affine) @ target.affine
        # Boolean splines do not exist in scipy; uint8 is exact for order 0.
        work = array.astype(np.uint8) if array.dtype == bool else array
        moved = affine_transform(
            work, matrix[:3, :3], matrix[:3, 3], target.shape, order=order, cval=fill, mode="constant"
        )
        return moved.astype(array.dtype)
    result = np.full(target.shape, fill, array.dtype)
    order_of_axes = np.argsort(exact.axes)
    moved = array.transpose(order_of_axes)
    source_slices, target_slices = [], []
    for t, a in enumerate(order_of_axes):
        n, sign, offset = source.shape[a], exact.sign[a], exact.offset[a]
        if sign < 0:
            moved = np.flip(moved, axis=t)
            offset = offset - (n - 1)
        low, high = max(0, offset), min(target.shape[t], offset + n)
        target_slices.append(slice(low, max(low, high)))
        source_slices.append(slice(low - offset, max(low, high) - offset))
    result[tuple(target_slices)] = moved[tuple(source_slices)]
    return result


def map_box(box: Sequence[float], source: Geometry, target: Geometry) -> tuple[float, ...]:
    """A box of one grid on the voxel edges of another: the bounding box of its eight corners.

    Parameters
    ----------
    box : sequence of float, (i0, j0, k0, i1, j1, k1)
        On voxel edges of `source`, half-open.
    source, target : Geometry

    Returns
    -------
    tuple of float, (i0, j0, k0, i1, j1, k1)
        On voxel edges of `target`; not clipped to it.

    Examples
    --------
    >>> lps = Geometry((10, 10, 10), np.array([[-1, 0, 0, 9], [0, -1, 0, 9], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    >>> map_box((1, 2, 3, 4, 5, 6), lps, Geometry((10, 10, 10), np.eye(4)))
    (6.0, 5.0, 3.0, 9.0, 8.0, 6.0)
    """
    low, high = np.asarray(box[:3], np.float64), np.asarray(box[3:], np.float64)
    corners = np.array(np.meshgrid(*np.stack([low, high], axis=1))).reshape(3, -1).T
    # The edge i of a voxel lies half a voxel before its centre.
    moved = target.index(source.world(corners - 0.5)) + 0.5
    # Affine arithmetic leaves 1e-14; a whole edge must stay whole so that box = mask exactly.
    moved = np.where(np.abs(moved - np.rint(moved)) < GRID_TOLERANCE, np.rint(moved), moved)
    return tuple(float(v) for v in (*moved.min(axis=0), *moved.max(axis=0)))
