"""Optional clean-up of predicted masks: small components removed, holes filled, as suits the validation cases best.

Off by default. What is done to each region is chosen on validation cases alone, never on those that are scored, and is
stored in the adapter, so that it belongs to the model like its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from scipy import ndimage

from medsam_lora.inference.predictor import PredictOptions, predict_slices, reference_boxes
from medsam_lora.inference.volume import to_native
from medsam_lora.labels import REGIONS, nested, region_mask
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.records import PreparedSlices

MIN_COMPONENT_ML: Final = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Smallest volumes of a component that are tried. 0.05 ml is where BraTS 2023 begins to count a lesion of glioma."""

NONE: Final = "none"

_TOUCHING = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class CleanUp:
    """What is done to the mask of one region.

    Parameters
    ----------
    min_component_ml : float
        Components (26-connected) of a smaller volume are removed.
    fill_holes : bool
        Whether background that the mask encloses becomes foreground.
    """

    min_component_ml: float = 0.0
    fill_holes: bool = False

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.min_component_ml > 0 or self.fill_holes


def clean(mask: np.ndarray, voxel_ml: float, how: CleanUp) -> np.ndarray:
    """Clean one mask: holes first, as they belong to the volume of their component.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)
    voxel_ml : float
        Volume of a voxel.
    how : CleanUp

    Returns
    -------
    ndarray of bool, same shape
        A new array.

    Examples
    --------
    >>> mask = np.zeros((5, 5, 7), bool)
    >>> mask[1:4, 1:4, 1:4] = True
    >>> mask[2, 2, 2] = False
    >>> mask[2, 2, 6] = True
    >>> int(clean(mask, 0.001, CleanUp(min_component_ml=0.002, fill_holes=True)).sum())
    27
    """
    if not mask.any() or not how.changes:
        return mask.copy()
    if how.fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    components, _ = ndimage.label(mask, _TOUCHING)
    keep = np.bincount(components.ravel()) * voxel_ml >= how.min_component_ml
    keep[0] = False
    return keep[components]


def clean_regions(masks: np.ndarray, voxel_ml: float, regions: Sequence[str], how: Mapping[str, CleanUp]) -> np.ndarray:
    """Clean the masks of all regions, and nest them again.

    Parameters
    ----------
    masks : ndarray of bool, shape (R, X, Y, Z)
    voxel_ml : float
    regions : sequence of R str
    how : mapping of str to CleanUp
        By region; one that is absent is left as it is.
    """
    cleaned = [clean(mask, voxel_ml, how.get(region, CleanUp())) for mask, region in zip(masks, regions, strict=True)]
    return nested(np.stack(cleaned))


@dataclass(frozen=True)
class ValidationCase:
    """A validation case as fitting needs it.

    Parameters
    ----------
    case_id : str
    prediction, reference : ndarray of bool, shape (R, X, Y, Z)
        On one grid.
    voxel_ml : float
    """

    case_id: str
    prediction: np.ndarray
    reference: np.ndarray
    voxel_ml: float


def validation_case(
    segmenter: Segmenter, case: PreparedSlices, kind: str, min_voxels: int, options: PredictOptions
) -> ValidationCase:
    """Predict a prepared case with its exact boxes, on its native grid.

    Parameters
    ----------
    segmenter : Segmenter
    case : PreparedSlices
        With its label.
    kind : str
        ``union`` or ``per_component``.
    min_voxels : int
        Components smaller than this get no box.
    options : PredictOptions
    """
    predicted = predict_slices(segmenter, case, reference_boxes(case, kind, min_voxels), options)
    label = np.asarray(case.label)
    return ValidationCase(
        case.case_id,
        np.stack([to_native(predicted[:, r], case) for r in range(predicted.shape[1])]),
        np.stack([to_native(region_mask(label, region), case) for region in segmenter.regions]),
        case.native.voxel_volume_ml,
    )


def fit(cases: Sequence[ValidationCase], regions: Sequence[str]) -> dict[str, CleanUp]:
    """Choose the clean-up of every region by its mean volumetric Dice over validation cases.

    Parameters
    ----------
    cases : sequence of ValidationCase
        At least one.
    regions : sequence of str

    Returns
    -------
    dict of str to CleanUp
        What gains nothing is not done: of equal ones the gentlest is taken, that which does nothing first.

    Raises
    ------
    ValueError
        Without a case.
    """
    if not cases:
        raise ValueError("there is no validation case to fit on")
    chosen = {}
    for r, region in enumerate(regions):
        means = {
            how: float(np.mean([_dice(clean(c.prediction[r], c.voxel_ml, how), c.reference[r]) for c in cases]))
            for how in _candidates()
        }
        chosen[region] = max(means, key=means.__getitem__)  # the first of equal ones
    return chosen


def describe(how: Mapping[str, CleanUp]) -> str:
    """One line for records and rows; ``none`` where nothing is done.

    Examples
    --------
    >>> describe({"WT": CleanUp(0.1, True), "TC": CleanUp()})
    'WT: components under 0.1 ml removed, holes filled'
    >>> describe({})
    'none'
    """
    parts = []
    for region, one in ((region, how[region]) for region in REGIONS if region in how):
        words = [f"components under {one.min_component_ml:g} ml removed"] if one.min_component_ml > 0 else []
        words += ["holes filled"] if one.fill_holes else []
        if words:
            parts.append(f"{region}: {', '.join(words)}")
    return "; ".join(parts) or NONE


def to_json(how: Mapping[str, CleanUp]) -> dict[str, Any]:
    """As plain data for an adapter's metadata."""
    return {region: asdict(one) for region, one in how.items()}


def from_json(data: Mapping[str, Any]) -> dict[str, CleanUp]:
    """From an adapter's metadata; an adapter without the entry does nothing."""
    return {region: CleanUp(float(one["min_component_ml"]), bool(one["fill_holes"])) for region, one in data.items()}


def _candidates() -> Iterator[CleanUp]:
    for fill_holes in (False, True):
        for smallest in MIN_COMPONENT_ML:
            yield CleanUp(smallest, fill_holes)


def _dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / total if total else 1.0
