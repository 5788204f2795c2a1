"""Turning a volume so that its array axes grow towards right, anterior and superior: views, never a resampling."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from medsam_lora.geometry import Geometry


def orient(array: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, Geometry]:
    """Flip and permute the axes to R, A, S, the closest the affine allows without interpolation.

    Parameters
    ----------
    array : ndarray, shape (..., X, Y, Z)
        On the native grid.
    geometry : Geometry
        Native grid.

    Returns
    -------
    array : ndarray, shape (..., X', Y', Z')
        A view of the input.
    geometry : Geometry
        The oriented grid; an oblique affine stays oblique.

    Examples
    --------
    >>> lps = Geometry((1, 2, 1), np.diag([-1.0, -1.0, 1.0, 1.0]))
    >>> turned, grid = orient(np.array([[[5], [6]]]), lps)
    >>> turned.ravel().tolist(), grid.affine[:3, 3].tolist(), grid.axis_codes
    ([6, 5], [0.0, -1.0, 0.0], ('R', 'A', 'S'))
    """
    orientation = nib.orientations.io_orientation(geometry.affine)
    # nibabel reorients leading axes; the channels stand in front here.
    moved = nib.orientations.apply_orientation(np.moveaxis(array, (-3, -2, -1), (0, 1, 2)), orientation)
    return np.moveaxis(moved, (0, 1, 2), (-3, -2, -1)), oriented(geometry)


def in_memory_order(array: np.ndarray) -> np.ndarray:
    """A view whose axes run as the memory does, the slowest first, for what does not ask where a voxel stands.

    numpy goes through an oriented volume along its last axis, which in a file is the slowest.

    Examples
    --------
    >>> in_memory_order(np.arange(6).reshape(2, 3).T[::-1]).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    axes, flips = memory_axes(array)
    return array.transpose(axes)[flips]


def memory_axes(array: np.ndarray) -> tuple[list[int], tuple[slice, ...]]:
    """The order of axes, and the slices that flip them then, that turn an array to `in_memory_order`."""
    axes = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    return axes, tuple(slice(None, None, -1 if array.strides[axis] < 0 else 1) for axis in axes)


def oriented(geometry: Geometry) -> Geometry:
    """The R, A, S grid whose voxels are those of `geometry`."""
    orientation = nib.orientations.io_orientation(geometry.affine)
    affine = geometry.affine @ nib.orientations.inv_ornt_aff(orientation, geometry.shape)
    shape = [0, 0, 0]
    for source, target in enumerate(orientation[:, 0].astype(int)):
        shape[target] = geometry.shape[source]
    return Geometry((shape[0], shape[1], shape[2]), affine)
