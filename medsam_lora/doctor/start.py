"""Before anything is learned: the base model through this pipeline, and the adapted model, which must still be it."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from loralib.layers import LoRALayer
from torch import nn

from medsam_lora.doctor.result import Result, fault, ok, skipped
from medsam_lora.doctor.subject import HALF, Subject, tumour_of
from medsam_lora.metrics.overlap import count
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import method_spec
from medsam_lora.peft.edits import Edit
from medsam_lora.prompts.sources import fill_boxes
from medsam_lora.records import PreparedSlices, SliceBox

BELOW_FLOOR = 0.1
"""Dice by which a base model may lie below the filled box: SAM lies 0.05 to 0.1 above it; a box in another frame or a
picture of one colour costs 0.3 and more."""
IDENTICAL = 1e-4
"""Largest difference of logits, relative to the largest logit, of the adapted model at step 0."""
REFERENCE_RANK = 4
FASTER = 3.0
"""How many times as far as at rank 4 two updates may move the weights. With alpha / rank it is below 1 at any rank,
without a scale 5 times at rank 64 (13 times later on)."""


def base(subject: Subject) -> Result:
    """Dice of the base model on the slices, beside that of their filled boxes."""
    masks = subject.predicted_by_base(HALF)
    dices, floors, inside = [], [], []
    for mask, case in zip(masks, subject.slices, strict=True):
        reference = tumour_of(case)
        filled = filled_boxes(subject, case)
        dices.append(_dice(mask[0].astype(bool), reference))
        floors.append(_dice(filled, reference))
        inside.append(float((mask[0].astype(bool) & filled).sum() / max(mask[0].astype(bool).sum(), 1)))
    dice, floor, within = (float(np.mean(values)) for values in (dices, floors, inside))
    measured = (
        f"Dice of the base model {dice:.3f} on {len(dices)} slices (lowest {min(dices):.3f}), of their filled boxes "
        f"{floor:.3f}; {within:.0%} of what it marks lies in the box"
    )
    threshold = subject.config.predict.threshold
    measured += "" if threshold == HALF else f" (at the threshold {HALF:g}, not your {threshold:g})"
    numbers = {"dice": dices, "floor": floors, "inside_box": inside}
    if subject.config.model.weights == "random":
        why = "the weights are random, of which nothing can be expected"
        return skipped(why, measured, "Give the weights that are adapted (model.weights).", **numbers)
    if "prompt_tokens" in subject.config.method.name:
        measured += " (boxes are not used by the method)"
    if dice < floor - BELOW_FLOOR:
        meaning = "The base model, through this pipeline, is far below the box it was given"
        meaning += (
            ": it marks other places than the box, so the box or the mask is in another frame."
            if within < 0.5
            else ": its input is not what it was trained on, or the weights are not those of the model."
        )
        return fault(
            measured,
            meaning,
            "Look at doctor.png (--out DIR) and at the checks input and box first; nothing trained on this is good.",
            **numbers,
        )
    if dice < floor:
        measured += "; below its box, so the base model sees little in these images"
    return ok(measured, **numbers)


def filled_boxes(subject: Subject, case: PreparedSlices) -> np.ndarray:
    """The boxes of a slice, filled: bool, shape (X, Y)."""
    boxes = [SliceBox(0, *(float(edge) for edge in box)) for box in subject.boxes(case)[case.ks[0]]]
    return fill_boxes(boxes, case.crop.at_slice(case.ks[0]))[:, :, 0]


def identity(subject: Subject) -> Result:
    """Whether a fresh adaptation leaves the model what it was, while training and while predicting."""
    if not method_spec(subject.config.method.name).identity:
        return skipped(f"{subject.config.method.name} does not start as the base model")
    segmenter = subject.fresh()
    differences = {}
    for name, mode in (("predicting", False), ("training", True)):
        segmenter.train(mode)
        with segmenter.adaptation.disable():
            expected = subject.logits(segmenter)
        found = subject.logits(segmenter)
        scale = max(float(one.abs().max()) for one in expected)
        worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        differences[name] = worst / max(scale, torch.finfo(torch.float32).tiny)
    measured = "logits of the fresh adaptation differ from the base model's by " + ", ".join(
        f"{value:.1e} of the largest {name}" for name, value in differences.items()
    )
    if not max(differences.values()) <= IDENTICAL:
        return fault(
            measured,
            "The model is changed before the first step: a branch does not start at zero, or a pretrained weight was "
            "not copied into the layer that replaces it.",
            "Start LoRA's B at zero, and keep the pretrained weight of every wrapped layer.",
            **differences,
        )
    return ok(measured, **differences)


def step(subject: Subject) -> Result:
    """How far two updates move the weights, compared with rank 4 at the same settings."""
    config = subject.config.method
    if not _branches(subject.segmenter):
        return skipped("the method has no low-rank branches in the encoder")
    own, few = (_moved(subject, subject.fresh(rank=rank)) for rank in (config.rank, REFERENCE_RANK))
    ratio = own / few if few > 0 else float("inf")
    measured = (
        f"two updates move the adapted weights by {own:.2e} of their norm at rank {config.rank} ({config.scaling}), "
        f"{ratio:.1f} times as far as at rank {REFERENCE_RANK}"
    )
    numbers = {"relative_change": own, "times_rank_4": ratio}
    if not ratio <= FASTER:
        return fault(
            measured,
            f"The step grows with the rank: no scale (alpha / rank) holds it, so a learning rate that suits rank 4 is "
            f"{ratio:.0f} times too high at rank {config.rank}, and training jumps or diverges.",
            "Set method.scaling=alpha/r and hold alpha fixed over ranks, or lower train.lr_encoder.",
            **numbers,
        )
    return ok(measured, **numbers)


def _branches(segmenter: Segmenter) -> list[Edit]:
    """The encoder's low-rank branches; other methods that `lora` is combined with have none."""
    edits = segmenter.adaptation.edits
    return [e for e in edits if isinstance(e.adapted, LoRALayer) and e.path.startswith("image_encoder.")]


def _moved(subject: Subject, segmenter: Segmenter) -> float:
    # At the full rate: a warm-up would be the same for both.
    subject.trainer(segmenter, epochs=2, slices_per_epoch=1, warmup_share=0.0).fit()
    change = norm = 0.0
    # Of the branches' layers alone: what other methods move has no rank and would hide the ratio, and some of it cannot
    # be merged at all.
    for edit in _branches(segmenter):
        base = {f"{edit.path}.{name}": tensor for name, tensor in cast(nn.Module, edit.base).state_dict().items()}
        for name, after in edit.merged().items():
            before = base[name].detach().double().cpu()
            difference = after.double().cpu() - before
            if difference.any():
                change += float(difference.square().sum())
                norm += float(before.square().sum())
    return (change / norm) ** 0.5 if norm else 0.0


def _dice(mask: np.ndarray, reference: np.ndarray) -> float:
    counts = count(reference, mask)
    return 2 * counts.tp / max(counts.n_reference + counts.n_prediction, 1)
