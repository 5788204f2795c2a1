"""Scores of a case as MONAI and scipy give them used plainly: what `evaluate.py` is measured against.

Both take ready masks of the regions and work on whole volumes.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medsam_lora.metrics.lesionwise import Challenge
from medsam_lora.metrics.marching_cubes import surface_areas

Masks = dict[str, tuple[np.ndarray, np.ndarray]]
Scores = dict[str, dict[str, float]]


def monai_plain(masks: Masks) -> Scores:
    """MONAI's own functions on the three regions as channels."""
    import torch
    from monai import metrics

    reference, prediction = (
        torch.from_numpy(np.stack([pair[which] for pair in masks.values()]))[None].float() for which in (0, 1)
    )
    pair = {"y_pred": prediction, "y": reference, "include_background": True}
    columns = {
        "dice": metrics.compute_dice(**pair),
        "hd95_mm": metrics.compute_hausdorff_distance(**pair, percentile=95),
        "assd_mm": metrics.compute_average_surface_distance(**pair, symmetric=True),
        "nsd_1mm": metrics.compute_surface_dice(**pair, class_thresholds=[1.0] * len(masks), use_subvoxels=True),
        "nsd_2mm": metrics.compute_surface_dice(**pair, class_thresholds=[2.0] * len(masks), use_subvoxels=True),
    }
    return {region: {name: float(column[0, i]) for name, column in columns.items()} for i, region in enumerate(masks)}


def scipy_plain(masks: Masks, challenge: Challenge) -> Scores:
    """The definitions of BraTS with scipy's operations on whole volumes."""
    return {region: _scipy_region(*pair, challenge) for region, pair in masks.items()}


def _scipy_region(reference: np.ndarray, prediction: np.ndarray, challenge: Challenge) -> dict[str, float]:
    touching, element = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)

    def grow(mask: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(mask, element, iterations=challenge.dilation_steps)

    lesions, n_lesions = ndimage.label(grow(reference), touching)
    components, n_components = ndimage.label(prediction, touching)
    used: set[int] = set()
    dices, distances = [], []
    for number in range(1, n_lesions + 1):
        lesion = (lesions == number) & reference
        near = set(np.unique(components[grow(lesion)]).tolist()) - {0}
        used |= near
        if lesion.sum() <= challenge.ignored_volume_mm3:
            continue
        found = np.isin(components, sorted(near))
        dices.append(2 * (lesion & found).sum() / (lesion.sum() + found.sum()))
        distances.append(_scipy_hd95(lesion, found)[0] if near else 374.0)
    fp = n_components - len(used)
    n = len(dices) + fp
    hd95, assd, near_1, near_2 = _scipy_hd95(reference, prediction)
    return {
        "dice": 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum()),
        "hd95_mm": hd95,
        "assd_mm": assd,
        "nsd_1mm": near_1,
        "nsd_2mm": near_2,
        "lesionwise_dice": sum(dices) / n,
        "lesionwise_hd95_mm": (sum(distances) + 374 * fp) / n,
    }


def _scipy_hd95(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    kernel = 1 << np.arange(7, -1, -1).reshape(2, 2, 2)
    table = surface_areas(1.0, 1.0, 1.0)
    codes = [ndimage.correlate(np.pad(m, 1).astype(np.uint8), kernel, mode="constant") for m in (a, b)]
    edges = [(code != 0) & (code != 255) for code in codes]
    transforms = [ndimage.distance_transform_edt(~edge) for edge in edges]
    directed, pooled, area = [], [], []
    for own, other in ((0, 1), (1, 0)):
        d, w = transforms[other][edges[own]], table[codes[own]][edges[own]]
        order = np.lexsort((w, d))
        d, w = d[order], w[order]
        directed.append(d[np.searchsorted(np.cumsum(w) / w.sum(), 0.95)])
        pooled.append(d)
        area.append(w)
    d, w = np.concatenate(pooled), np.concatenate(area)
    return float(max(directed)), float(d @ w / w.sum()), *(float(w[d <= mm].sum() / w.sum()) for mm in (1, 2))
