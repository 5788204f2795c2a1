"""What the image encoder is given: the range it was trained on, once normalised, and the same on every path."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from medsam_lora.doctor.frames import predict_volumes
from medsam_lora.doctor.result import Result, fault, ok
from medsam_lora.doctor.subject import Subject
from medsam_lora.doctor.watch import grey, watching

FLAT = 10.0
"""Deviation of grey values, of 255, below which a picture is all but one colour. A window of z-scores gives 50 to 80;
the same normalised twice gives 1, z-scores taken for grey values 1, values of 0 to 1 give 0.3."""
OUTSIDE = 1.0
"""Grey values by which pixels may leave 0 to 255: rounding, not another range."""
SATURATED = 0.35
"""Share of a picture that may be at full white."""
FILLED = 0.98
"""Share of the plane that a skull-stripped brain may fill; a crop that fits an ellipse is filled to 0.79."""
SAME = 1e-3
"""Largest difference, in deviations of SAM's normalisation, between two paths to the same slice."""


def check(subject: Subject) -> Result:
    """Grey values at the encoder's first layer, and whether training, validation and prediction agree on them."""
    segmenter = subject.segmenter
    with watching(segmenter) as trained:
        subject.logits(segmenter)
    with watching(segmenter) as validated:
        subject.predicted(segmenter)
    values = torch.cat(
        [
            grey(pixels, case.crop.shape[:2], segmenter.sam.image_size).flatten()
            for pixels, case in zip(trained.pixels, subject.slices, strict=True)
        ]
    )
    low, high, spread = float(values.min()), float(values.max()), float(values.std())
    white = float((values > 254.5).float().mean())
    filled = _filled(subject)
    differences = {"validation": _difference(trained.pixels, validated.pixels)}
    if subject.records:
        differences["prediction from the files"] = _difference(trained.pixels, _from_files(subject))
    numbers = {"low": low, "high": high, "deviation": spread, "white_share": white, "brain_share": filled}
    numbers |= {f"difference_{name.split()[0]}": value for name, value in differences.items()}
    agree = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
    measured = (
        f"the encoder sees grey values {low:.1f} to {high:.1f} with a deviation of {spread:.1f} ({white:.0%} white); "
        f"the brain fills {filled:.0%} of the plane; largest difference from training: {agree}"
    )
    if not all(np.isfinite(v) for v in (low, high, spread)):
        return fault(measured, "The pixels are not finite.", "Look for NaN in the images with verify.", **numbers)
    if spread < FLAT:
        return fault(
            measured,
            "The picture is almost one colour, where 0 to 255 is expected: the input is normalised twice (z-scores or "
            "normalised pixels taken for grey values), or scaled to 0..1.",
            "Normalise once: raw voxels to z-scores to 0..255, then SAM's mean and deviation; set "
            "model.input_range=window.",
            **numbers,
        )
    if low < -OUTSIDE or high > 255 + OUTSIDE:
        return fault(
            measured,
            "The input range is not the 0 to 255 that SAM was trained on: z-scores are given as they are, or pixels "
            "were never normalised with SAM's mean and deviation.",
            "Set model.input_range=window (zscore is an ablation).",
            **numbers,
        )
    if white > SATURATED:
        return fault(
            measured,
            "Much of the picture is saturated: the intensity window is not that of these images.",
            "Set model.input_range=minmax, or look at the intensities of the files.",
            **numbers,
        )
    if subject.slices[0].voxels == "nonzero" and filled > FILLED:
        return fault(
            measured,
            "The background is not 0: the images are not skull-stripped, or were normalised before, so that the mean "
            "over non-zero voxels is one over air as well.",
            "Give the original skull-stripped images, or set intensity.voxels=all.",
            **numbers,
        )
    apart = [name for name, value in differences.items() if not value <= SAME]
    if apart:
        return fault(
            measured,
            f"Training and {' and '.join(apart)} do not give the encoder the same picture of the same slice.",
            "Use one normalisation on every path; prepare again if the store is old.",
            **numbers,
        )
    return ok(measured, **numbers)


def _from_files(subject: Subject) -> list[Tensor]:
    segmenter = subject.segmenter
    with watching(segmenter) as seen:
        for case in subject.slices:
            predict_volumes(subject, subject.volumes(case.case_id), case)
    return seen.pixels


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _filled(subject: Subject) -> float:
    return float(np.mean([np.count_nonzero(case.image) / case.image.size for case in subject.slices]))
