"""From canonical labels to the masks of tumour regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsam_lora.labels import region_mask
from medsam_lora.transforms.orientation import in_memory_order


def region_masks(label_map: np.ndarray, regions: Sequence[str]) -> np.ndarray:
    """Masks of several regions, stacked in front; the label map itself is kept for other regions.

    Parameters
    ----------
    label_map : ndarray of integer, any shape
        Canonical labels.
    regions : sequence of str, length R
        Keys of `labels.REGIONS`.

    Returns
    -------
    ndarray of bool, shape (R, ...)

    Examples
    --------
    >>> region_masks(np.array([0, 1, 2, 3]), ["WT", "ET"]).astype(int).tolist()
    [[0, 1, 1, 1], [0, 0, 0, 1]]
    """
    return np.stack([region_mask(label_map, region) for region in regions])


def region_areas(label_map: np.ndarray, region: str) -> np.ndarray:
    """Voxels of a region in every transverse slice, shape (X, Y, Z) to (Z,)."""
    areas = np.zeros(label_map.shape[-1], np.int64)
    # Plane by plane, most of which are blank, and each as it lies in memory, where counting is fastest.
    for k in range(len(areas)):
        plane = in_memory_order(label_map[..., k])
        if np.count_nonzero(plane):
            areas[k] = np.count_nonzero(region_mask(plane, region))
    return areas
