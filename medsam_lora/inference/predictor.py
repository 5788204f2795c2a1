"""Masks of whole cases, slice batch by slice batch, on the crop grid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from medsam_lora.inference.batches import BatchLimit, in_batches
from medsam_lora.labels import nested, region_mask
from medsam_lora.models.precision import autocast, float32_products
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
        Slices per forward pass, each with all its modalities; halved where memory runs out.
    amp : str
        ``none``, ``tf32``, ``bf16``, ``fp16`` or ``auto``.
    threshold : float
        Probability above which a voxel is foreground.
    limit : BatchLimit
        What fitted once memory had run out; share it between calls to fall back only once.
    """

    batch_size: int = 4
    amp: str = "none"
    threshold: float = 0.5
    limit: BatchLimit = field(default_factory=BatchLimit, compare=False)


CaseEmbeddings = Mapping[int, torch.Tensor]
"""Slice index k of the oriented grid to its embedding, (M, D, s, s), on the CPU."""


def embed_case(
    segmenter: Segmenter, case: PreparedSlices, options: PredictOptions, ks: Iterable[int] | None = None
) -> CaseEmbeddings:
    """Image embeddings of a case's slices, for any number of prompts of it with `predict_slices`.

    Parameters
    ----------
    segmenter : Segmenter
        The embeddings are of its weights as they are now.
    case : PreparedSlices
    options : PredictOptions
    ks : iterable of int, optional
        Slices wanted; all of them by default.

    Returns
    -------
    mapping of int to Tensor
        See `CaseEmbeddings`: 4 MiB in float32 for each modality of a slice at 1024 pixels.
    """
    wanted = set(case.ks if ks is None else ks)
    numbers = [n for n, k in enumerate(case.ks) if k in wanted]
    embeddings: dict[int, torch.Tensor] = {}

    def embed(chunk: list[int]) -> None:
        z = _normalised(segmenter, case, chunk)
        computed = segmenter.embed(z, _present(segmenter, case)).unflatten(0, (len(chunk), -1)).cpu()
        embeddings.update({case.ks[n]: one for n, one in zip(chunk, computed, strict=True)})

    with _predicting(segmenter, options):
        in_batches(numbers, options.batch_size, embed, options.limit, case.case_id)
    return embeddings


def predict_slices(
    segmenter: Segmenter,
    case: PreparedSlices,
    boxes: Mapping[int, np.ndarray],
    options: PredictOptions,
    embeddings: CaseEmbeddings | None = None,
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
    embeddings : mapping of int to Tensor, optional
        From `embed_case` with this segmenter; the image encoder does not run then.

    Returns
    -------
    ndarray of bool, shape (N, R, X, Y)
        Every region within the one before it (`labels.nested`).

    Raises
    ------
    DataError
        ``out_of_memory``, where not even one slice fits.
    KeyError
        Where a slice with boxes is not among the embeddings.
    """
    present = _present(segmenter, case)
    x, y, _ = case.crop.shape
    masks = np.zeros((len(case.ks), len(segmenter.regions), x, y), bool)
    prompted = [n for n, k in enumerate(case.ks) if len(boxes.get(k, ())) > 0]
    cut = math.log(options.threshold / (1 - options.threshold))

    def predict(chunk: list[int]) -> None:
        prompts = [boxes[case.ks[n]] for n in chunk]
        if embeddings is None:
            output = segmenter(_normalised(segmenter, case, chunk), prompts, present)
        else:
            stacked = torch.cat([embeddings[case.ks[n]] for n in chunk]).to(segmenter.device)
            output = segmenter.decode(stacked, prompts, (x, y), present)
        masks[chunk] = (output.logits > cut).cpu().numpy()

    with _predicting(segmenter, options):
        in_batches(prompted, options.batch_size, predict, options.limit, case.case_id)
    return nested(masks.swapaxes(0, 1)).swapaxes(0, 1)


@contextmanager
def _predicting(segmenter: Segmenter, options: PredictOptions) -> Iterator[None]:
    """Evaluation mode, no gradients, and the precision asked for; the mode before is put back."""
    was_training = segmenter.training
    segmenter.eval()
    device = segmenter.device
    try:
        with torch.inference_mode(), autocast(device, options.amp), float32_products(device, options.amp):
            yield
    finally:
        segmenter.train(was_training)


def _present(segmenter: Segmenter, case: PreparedSlices) -> list[int]:
    return [segmenter.modalities.index(name) for name in case.modalities]


def _normalised(segmenter: Segmenter, case: PreparedSlices, numbers: list[int]) -> torch.Tensor:
    """z-scored slices, or stacks: raw voxels travel to the device, half as many bytes, and are normalised there."""
    depth, device = segmenter.adaptation.report.depth, segmenter.device
    raw, mean, std = (np.stack(parts) for parts in zip(*(stack_of(case, n, depth) for n in numbers), strict=True))
    voxels = torch.from_numpy(raw)
    if device.type == "cuda":
        voxels = voxels.pin_memory().to(device, non_blocking=True)
    return zscore(voxels, mean, std, case.voxels)


def stack_of(case: PreparedSlices, n: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A slice (M, X, Y) as in the file, or with its neighbours (depth, M, X, Y) where `depth` is more than 1.

    Returns
    -------
    raw, mean, std : ndarray
        `mean` and `std` without the axes of the plane.
    """
    taken: list[int] | int = stack_around(case.ks, n, depth) if depth > 1 else n
    return np.asarray(case.image[taken]), case.mean[taken], case.std[taken]


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
