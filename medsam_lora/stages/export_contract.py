"""What must be done before and behind an exported model, as data: its side-car file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from medsam_lora import __version__
from medsam_lora.config import PredictConfig, load_config
from medsam_lora.inference import postprocess
from medsam_lora.models import MODELS
from medsam_lora.models.fusion import Learned
from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.transforms.cropping import crop_size
from medsam_lora.transforms.stages import PreparePlan

FORMAT_VERSION: Final = 1

FUSION_RULES: Final[Mapping[str, str]] = {
    "mean_logit": "mean over the modalities of the logits",
    "mean_probability": "p = mean over the modalities of sigmoid(logits); the fused logit is log(p / (1 - p))",
    "max": "largest logit over the modalities",
    "vote": "median of the logits over the modalities; of the two middle ones of an even number their mean, or, where "
    "one is above 0 and the other is not, the upper one if the mean logit is above 0 and else the lower one",
    "learned": "mean of the logits weighted by fusion.weights",
}
"""How each fusion (`models.fusion`) is computed without this package, at every pixel of the decoder's grid."""

PIXEL_RULES: Final[Mapping[str, str]] = {
    "window": "grey = clip((z - low) / (high - low), 0, 1) * 255, and 0 where z is exactly 0",
    "minmax": "grey = (z - low) / (high - low) * 255 with the smallest and largest non-zero z of the slice as low and "
    "high, and 0 where z is exactly 0",
    "zscore": "the z-scores themselves stand in for normalised pixels; no mean is taken off them",
}


def frame_of(segmenter: Segmenter, metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """The part of the model frame, (h, w) in model pixels, that a run's slices are encoded on.

    Parameters
    ----------
    segmenter : Segmenter
    metadata : mapping
        Of its adapter.

    Returns
    -------
    tuple of int, optional
        None on the unpadded grid of uncropped slices, where every plane has another.
    """
    size = segmenter.sam.image_size
    if segmenter.sam.grid == "padded":
        return size, size
    plane = crop_size(PreparePlan.from_json(metadata["plan"]).crop)
    return None if plane is None else segmenter.frame(plane)


def threshold_of(adapter: Path) -> float:
    """The probability above which a run counts a voxel as tumour; see `predict_settings_of`.

    Parameters
    ----------
    adapter : Path
    """
    return predict_settings_of(adapter).threshold


def predict_settings_of(adapter: Path) -> PredictConfig:
    """How a run predicts, by its ``config.yaml``; the defaults without one.

    Parameters
    ----------
    adapter : Path
        The run's adapter file, beside which its settings lie.
    """
    config = adapter.with_name("config.yaml")
    return load_config(config).predict if config.is_file() else PredictConfig()


def contract(segmenter: Segmenter, metadata: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """What a user of an exported model must know, whatever the format.

    Parameters
    ----------
    segmenter : Segmenter
    metadata : mapping
        Of its adapter.
    threshold : float
        Probability above which a voxel is tumour (`threshold_of`).

    Returns
    -------
    dict
        Plain data: what it is (``model``, ``method``, ``base_sha256``, ``adapter_sha256`` ...), ``input`` (from files
        to pixels), ``boxes``, ``masks`` (which token is which region, and the way back), ``fusion``.
    """
    sam = segmenter.sam
    plan = PreparePlan.from_json(metadata["plan"])
    frame = frame_of(segmenter, metadata)
    reached = "the part of the frame that the slice reaches" if frame is None else f"{frame[0]} x {frame[1]}"
    notice = MODELS[sam.name].notice
    return {
        "format_version": FORMAT_VERSION,
        "medsam_lora": __version__,
        **({} if notice is None else {"notice": notice}),
        "model": sam.name,
        "image_size": sam.image_size,
        "grid": sam.grid,
        "method": metadata["method"],
        "base_sha256": metadata["base_sha256"],
        "adapter_sha256": metadata["content_sha256"],
        "modalities": list(segmenter.modalities),
        "regions": list(segmenter.regions),
        "input": _input(segmenter, plan, frame, reached),
        "boxes": {
            "order": "x0, y0, x1, y1 in model pixels: x along columns (axis 1 of a slice), y along rows (axis 0)",
            "from_voxels": "a box (i0, j0, i1, j1) on voxel edges of the crop is (j0, i0, j1, i1) * scale",
        },
        "masks": {
            "tokens": dict(zip(segmenter.regions, segmenter.main_tokens, strict=True)),
            "tokens_mean": "number of the mask token (axis 1 of the logits) that is a region's mask",
            "by_area": segmenter.regions_by_area,
            "by_area_means": "true: the method trains no regions, and the masks of a slice are given to them by area",
            "several_boxes": "one mask from those of several boxes of a slice: the largest logit at every pixel",
            "back": f"after the fusion: bilinear to {reached} model pixels, without the padding, "
            "bilinear to the crop (both with align_corners=False); foreground where the logit is above logit_above",
            "threshold": threshold,
            "logit_above": math.log(threshold / (1 - threshold)),
            "nested": "every region within the one before it, where there are several",
            "clean_up": postprocess.describe(postprocess.from_json(metadata.get("postprocess", {}))),
        },
        "fusion": _fusion(segmenter, str(metadata["fusion"])),
    }


def _input(segmenter: Segmenter, plan: PreparePlan, frame: tuple[int, int] | None, reached: str) -> dict[str, Any]:
    spec, size, depth = segmenter.input_spec, segmenter.sam.image_size, segmenter.adaptation.report.depth
    stack = "" if depth == 1 else f"; {depth} neighbouring slices, the middle one of which is segmented"
    return {
        "one_image": f"one transverse slice of one modality, the same grey in all three colours{stack}",
        "orientation": "R, A, S: rows of a slice are the first axis (left to right), columns the second",
        "crop": plan.to_json()["crop"],
        "crop_size": crop_size(plan.crop),
        "zscore": {
            "rule": "z = (voxel - mean) / deviation where voxels count, exactly 0 elsewhere",
            "voxels": plan.voxels,
            "scope": plan.scope,
        },
        "range": {**spec.to_json(), "rule": PIXEL_RULES[spec.name]},
        "pixel_mean": list(PIXEL_MEAN),
        "pixel_std": list(PIXEL_STD),
        "normalised": spec.name != "zscore",
        "resize": f"long side of the crop to {size} pixels (scale = {size} / long side), the other in proportion, "
        "rounded half up; bilinear, align_corners=False, no antialiasing",
        "padding": f"after the normalisation, zeros at the bottom and right up to {reached} pixels",
        "frame": None if frame is None else list(frame),
    }


def _fusion(segmenter: Segmenter, name: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": name,
        "where": "not part of the exported model: on the logits of the decoder, one image per modality",
        "rule": FUSION_RULES[name],
    }
    if isinstance(segmenter.fusion, Learned):
        weights: Tensor = segmenter.fusion.modality_weights.detach().softmax(dim=0)
        about["weights"] = dict(zip(segmenter.modalities, weights.tolist(), strict=True))
    return about
