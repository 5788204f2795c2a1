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


def oriented(geometry: Geometry) -> Geometry:
    """The R, A, S grid whose voxels are those of `geometry`."""
    orientation = nib.orientations.io_orientation(geometry.affine)
    affine = geometry.affine @ nib.orientations.inv_ornt_aff(orientation, geometry.shape)
    shape = [0, 0, 0]
    for source, target in enumerate(orientation[:, 0].astype(int)):
        shape[target] = geometry.shape[source]
    return Geometry((shape[0], shape[1], shape[2]), affine)
