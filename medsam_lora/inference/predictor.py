"""Masks of whole cases, slice batch by slice batch, on the crop grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from medsam_lora.labels import nested, region_mask
from medsam_lora.models.precision import autocast
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import PreparedSlices
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.slicing import stack_around


@dataclass(frozen=True)
class PredictOptions:
    """How slices are predicted.

    Parameters
    ----------
    batch_size : int
        Slices per forward pass, each with all its modalities.
    amp : str
        ``none``, ``bf16``, ``fp16`` or ``auto``.
    threshold : float
        Probability above which a voxel is foreground.
    """

    batch_size: int = 4
    amp: str = "none"
    threshold: float = 0.5


def predict_slices(
    segmenter: Segmenter, case: PreparedSlices, boxes: Mapping[int, np.ndarray], options: PredictOptions
) -> np.ndarray:
    """Masks of a case's slices.

    Parameters
    ----------
    segmenter : Segmenter
        Switched to evaluation mode and back.
    case : PreparedSlices
        Its modalities may be any subset of the segmenter's.
    boxes : mapping of int to ndarray of float, shape (n, 4)
        By slice index k of the oriented grid, on voxel edges of the crop grid; slices without boxes stay empty.
    options : PredictOptions

    Returns
    -------
    ndarray of bool, shape (N, R, X, Y)
        Every region within the one before it (`labels.nested`).
    """
    present = [segmenter.modalities.index(name) for name in case.modalities]
    x, y, _ = case.crop.shape
    masks = np.zeros((len(case.ks), len(segmenter.regions), x, y), bool)
    prompted = [n for n, k in enumerate(case.ks) if len(boxes.get(k, ())) > 0]
    cut = math.log(options.threshold / (1 - options.threshold))
    was_training = segmenter.training
    segmenter.eval()
    try:
        with torch.inference_mode(), autocast(segmenter.device, options.amp):
            for first in range(0, len(prompted), options.batch_size):
                chunk = prompted[first : first + options.batch_size]
                z = np.stack([stack_of(case, n, segmenter.adaptation.report.depth) for n in chunk])
                output = segmenter(
                    torch.from_numpy(z).to(segmenter.device), [boxes[case.ks[n]] for n in chunk], present
                )
                masks[chunk] = (output.logits > cut).cpu().numpy()
    finally:
        segmenter.train(was_training)
    return nested(masks.swapaxes(0, 1)).swapaxes(0, 1)


def stack_of(case: PreparedSlices, n: int, depth: int) -> np.ndarray:
    """A slice z-scored, (M, X, Y), or with its neighbours (depth, M, X, Y) where `depth` is more than 1."""
    taken = stack_around(case.ks, n, depth)
    z = [zscore(np.asarray(case.image[i]), case.mean[i], case.std[i], case.voxels) for i in taken]
    return np.stack(z) if depth > 1 else z[0]


@dataclass(frozen=True)
class CaseScore:
    """Volumetric agreement of one case and region during training.

    Parameters
    ----------
    dice : float
    area_ratio : float
        Predicted volume over reference volume.
    """

    dice: float
    area_ratio: float


def reference_boxes(case: PreparedSlices, kind: str, min_voxels: int) -> dict[int, np.ndarray]:
    """Exact whole-tumour boxes of a prepared case, by slice index k; see `validate_case`."""
    assert case.label is not None
    label = np.asarray(case.label)
    return {k: boxes_from_mask(region_mask(label[n], "WT"), kind, min_voxels) for n, k in enumerate(case.ks)}


def validate_case(
    segmenter: Segmenter, case: PreparedSlices, kind: str, min_voxels: int, options: PredictOptions
) -> CaseScore:
    """Volumetric Dice of a prepared case with its reference boxes, the mean over the segmenter's regions.

    The store holds every slice of validation cases that shows tumour, so with reference boxes this is the Dice over
    the whole volume; tumour voxels that the crop cut off count as missed (in WT: their labels are not known).

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
    assert case.label is not None
    label = np.asarray(case.label)
    masks = predict_slices(segmenter, case, reference_boxes(case, kind, min_voxels), options)
    lost = int(case.report.get("tumour_voxels_lost") or 0)
    dices, ratios = [], []
    for r, region in enumerate(segmenter.regions):
        reference = region_mask(label, region)
        n_reference = int(reference.sum()) + (lost if region == "WT" else 0)
        n_prediction = int(masks[:, r].sum())
        overlap = int((masks[:, r] & reference).sum())
        total = n_reference + n_prediction
        dices.append(2 * overlap / total if total else 1.0)
        ratios.append(n_prediction / n_reference if n_reference else float(n_prediction == 0))
    return CaseScore(float(np.mean(dices)), float(np.mean(ratios)))
