"""From masks of slices back to the patient: the native grid, by one placement."""

from __future__ import annotations

import numpy as np

from medsam_lora.geometry import place
from medsam_lora.records import PreparedSlices


def to_native(masks: np.ndarray, case: PreparedSlices) -> np.ndarray:
    """Masks of slices as a volume on the native grid.

    Parameters
    ----------
    masks : ndarray of bool, shape (N, X, Y)
        On the crop grid, in the order of ``case.ks``.
    case : PreparedSlices

    Returns
    -------
    ndarray of bool, shape case.native.shape
        False on slices that were not predicted and outside the crop.
    """
    volume = np.zeros(case.crop.shape, bool)
    volume[:, :, list(case.ks)] = masks.transpose(1, 2, 0)
    return place(volume, case.crop, case.native)
