"""Whether training trains: every declared tensor and nothing else, and four slices until they are known by heart."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam_lora.doctor.result import Result, fault, ok, skipped
from medsam_lora.doctor.subject import Subject
from medsam_lora.inference.predictor import validate_case
from medsam_lora.labels import region_mask
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import method_spec
from medsam_lora.transforms.resizing import through_decoder_grid

TARGET = 0.95
LEAST_TARGET = 0.85
"""Dice on the slices that were trained on. Where the decoder's grid leaves less of the references, that is the aim, but
not below the second number: trained logits say more than the mean over a cell of the grid."""
UPDATES_PER_EPOCH = 5
RISING = 0.01
"""Gain in Dice over the last quarter of an attempt above which it was not at its end."""
SHORT = 4
"""Points of a curve below which it shows no trend."""
APART = 0.05
"""Dice by which training's own forward pass and validation may differ with the same weights, by dropout or fusion."""
FELL = 0.1
"""Dice below the best of an attempt that is a divergence."""
FALLEN = 0.6
"""Share of its first value below which the loss of an attempt has fallen."""
COLLAPSED = 0.1
"""Share of the tumour's area below which a prediction is background."""
RATE = 10.0
"""What the learning rates are raised by for a second attempt, which shows what can be learned at all."""


class _Enough(Exception):
    """Nothing is to be gained by going on with an attempt."""


def moved(subject: Subject) -> Result:
    """Whether two updates, with a state loaded between them, move every declared tensor and no other."""
    segmenter = subject.segmenter
    declared = _declared(segmenter)
    if not declared:
        return skipped(f"{subject.config.method.name} trains nothing")
    before = _tensors(segmenter)
    trainer = subject.trainer(segmenter, epochs=2, slices_per_epoch=min(len(subject.slices), 2))
    optimised = {id(p) for group in trainer.optimiser.param_groups for p in group["params"]}
    with_gradient: set[str] = set()

    def between(row: dict[str, Any]) -> None:
        if row["epoch"]:
            with_gradient.update(n for n, p in _parameters(segmenter).items() if _any(p.grad))
        if row["epoch"] == 1:
            # As a resumed run does: whoever replaces parameters here trains tensors that the model no longer has.
            segmenter.load_adapter_state(segmenter.adapter_state())

    trainer.fit(between)
    subject.updates += 2
    after = _tensors(segmenter)
    changed = {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}
    still = sorted(declared - changed)
    silent = sorted(declared - with_gradient)
    others = sorted(changed - declared)
    forgotten = sorted(n for n, p in _parameters(segmenter).items() if n in declared and id(p) not in optimised)
    measured = (
        f"{len(declared & changed)} of {len(declared)} declared tensors moved in two updates, "
        f"{len(declared) - len(silent)} had a gradient, {len(declared) - len(forgotten)} are in the optimiser, "
        f"{len(others)} others changed"
    )
    numbers = {"declared": len(declared), "still": still, "without_gradient": silent, "others": others}
    numbers["not_in_optimiser"] = forgotten
    if still or forgotten:
        names = ", ".join((still or forgotten)[:3])
        return fault(
            measured,
            f"Not trained: {names}. The optimiser does not hold what the model computes with: a part was left out, "
            "or parameters were replaced after the optimiser was built.",
            "Build the optimiser from the declared tensors, and copy loaded states into them in place.",
            **numbers,
        )
    if silent:
        return fault(
            measured,
            f"No gradient reaches {', '.join(silent[:3])}: the way to it is cut (no_grad, a merged "
            "branch, a threshold).",
            "Run the adapted parts with autograd, unmerged.",
            **numbers,
        )
    if others:
        return fault(
            measured,
            f"What is frozen changed: {', '.join(others[:3])}.",
            "Never let train() or eval() edit weights, and train declared tensors only.",
            **numbers,
        )
    if _lacks_decoder(subject, declared):
        return fault(
            measured,
            "The mask decoder is to be trained, but none of its tensors is declared: LoRA alone learns little.",
            "Train the mask decoder (method.decoder=full).",
            **numbers,
        )
    return ok(measured, **numbers)


def overfit(subject: Subject) -> Result:
    """Whether the slices can be learned by heart, within a bound of updates and time; with the curve."""
    if not _declared(subject.segmenter):
        return skipped(f"{subject.config.method.name} trains nothing")
    target = min(TARGET, max(ceiling(subject), LEAST_TARGET))
    deadline = time.monotonic() + 60 * subject.minutes
    segmenter, factor, curve, counted, late = subject.segmenter, 1.0, [], 0.0, False
    reached: list[float] = []
    for factor in (1.0, RATE):
        if factor > 1:
            segmenter = subject.segmenter = subject.fresh()
            subject.updates = 0
        curve = _attempt(subject, segmenter, factor, target, deadline)
        late = time.monotonic() > deadline
        counted = _dice_in_training(subject, segmenter)
        reached.append(curve[-1]["dice"])
        if curve[-1]["dice"] >= target or late or _apart(curve, counted):
            break
    first, last = curve[0], curve[-1]
    measured = (
        f"{len(subject.slices)} slices trained on to Dice {last['dice']:.3f} (lowest {last['lowest']:.3f}; aim "
        f"{target:.3f}) in {last['update']} updates{'' if factor == 1 else f' at {RATE:g} times the learning rates'}: "
        f"loss {first['loss']:.3f} to {last['loss']:.3f}, Dice " + " ".join(f"{row['dice']:.2f}" for row in _few(curve))
    )
    numbers = {"curve": curve, "target": target, "rate_factor": factor, "dice_in_training": counted, "reached": reached}
    if last["dice"] >= target and not _apart(curve, counted):
        return ok(measured + _low_rates(subject, factor, reached[0]), **numbers)
    meaning, remedy = _why(subject, curve, counted, late)
    if meaning:
        return fault(measured, meaning, remedy, **numbers)
    why = f"not at its end when {subject.steps} updates or {subject.minutes:g} minutes were over"
    remedy = "Give more (--steps, --minutes), a GPU, or a smaller model.image_size."
    return skipped(why, measured, remedy, **numbers)


def _low_rates(subject: Subject, factor: float, reached: float) -> str:
    """That the aim was not reached at the configured rates: no fault, as the slices can be learned."""
    if factor == 1:
        return ""
    options = subject.config.train
    own = f"train.lr={options.lr:g}"
    own += "" if options.lr_encoder is None else f", train.lr_encoder={options.lr_encoder:g}"
    return (
        f"; at the rates of the settings ({own}) only Dice {reached:.3f}: they are low for so few updates, raise them"
    )


def ceiling(subject: Subject) -> float:
    """What the decoder's grid leaves of the references: the Dice that `validate_case` would give to just that."""
    found = []
    for case in subject.slices:
        label = np.asarray(case.label)
        for region in subject.segmenter.regions:
            reference = torch.from_numpy(region_mask(label, region))[None]
            left = through_decoder_grid(reference, subject.segmenter.sam.image_size)
            total = int(left.sum() + reference.sum())
            found.append(2 * int((left & reference).sum()) / total if total else 1.0)
    return float(np.mean(found))


def _attempt(
    subject: Subject, segmenter: Segmenter, factor: float, target: float, deadline: float
) -> list[dict[str, Any]]:
    """Train on the slices; the curve of loss and Dice by update."""
    config = subject.config
    options = config.train
    n = len(subject.slices)
    batch = min(options.batch_size, n)
    repeats = max(1, math.ceil(UPDATES_PER_EPOCH * batch / n))
    per_epoch = math.ceil(repeats * n / batch)
    epochs = max(1, math.ceil(subject.steps / per_epoch))
    rate = options.lr_encoder
    trainer = subject.trainer(
        segmenter,
        epochs=epochs,
        repeats=repeats,
        batch_size=batch,
        warmup_share=1 / epochs if epochs > 1 else 0.0,
        lr=options.lr * factor,
        lr_encoder=None if rate is None else rate * factor,
    )
    curve: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        if not row["epoch"]:
            return
        scores = [
            validate_case(segmenter, c, config.prompt.boxes, config.prompt.min_component_voxels, subject.options).dice
            for c in subject.slices
        ]
        curve.append(
            {
                "update": row["epoch"] * per_epoch,
                "loss": row["loss"],
                "dice": float(np.mean(scores)),
                "lowest": min(scores),
                "training_dice": row["train_dice"],
                "area_ratio": row["train_area_ratio"],
            }
        )
        subject.updates += per_epoch
        if curve[-1]["dice"] >= target or time.monotonic() > deadline:
            raise _Enough

    with suppress(_Enough):
        trainer.fit(note)
    return curve


def _why(subject: Subject, curve: list[dict[str, Any]], counted: float, late: bool) -> tuple[str, str]:
    """What kept the slices from being learned, and what to do; empty where only the end was not reached."""
    first, last = curve[0], curve[-1]
    best = max(row["dice"] for row in curve)
    if _apart(curve, counted):
        return (
            f"Training itself counts Dice {counted:.2f} on the same slices: what is evaluated is not "
            "what is trained (other weights, another mode, another input, or another threshold).",
            "Look at the checks input, score and reload.",
        )
    if best - last["dice"] > FELL:
        return (
            f"Training diverged: Dice fell back from {best:.2f}.",
            "Lower train.lr, raise train.warmup_share, and set train.clip_norm=1.",
        )
    if late or len(curve) < SHORT or last["dice"] - curve[-max(2, len(curve) // 4)]["dice"] > RISING:
        return "", ""
    fell = last["loss"] < FALLEN * first["loss"]
    if last["area_ratio"] < COLLAPSED:
        return (
            f"Only {last['area_ratio']:.0%} of the tumour's area is marked{' while the loss falls' if fell else ''}: "
            "the prediction slides to background, which a loss that cross-entropy dominates rewards.",
            "Set train.dice_weight=1, and look at the check loss.",
        )
    if subject.config.method.decoder == "frozen":
        return (
            "The mask decoder is frozen: LoRA alone could not learn four slices by heart.",
            "Set method.decoder=full.",
        )
    if fell:
        return (
            f"The loss falls to {last['loss'] / first['loss']:.0%} of its start and {last['area_ratio']:.0%} of the "
            f"tumour's area is marked, but the Dice stays at {last['dice']:.2f}: it is not background that wins; the "
            "masks lie beside the tumour, or what is trained cannot follow its edge.",
            "Look at the checks box and labels; if those are ok train more (method.rank, method.decoder=full), or "
            "raise model.image_size.",
        )
    return (
        "Four slices cannot be learned by heart: too little is trained, it does not reach what is predicted, or masks "
        "and images do not belong together.",
        "Look at the checks box, labels and moved; raise train.lr if those are ok.",
    )


def _apart(curve: list[dict[str, Any]], counted: float) -> bool:
    return abs(curve[-1]["dice"] - counted) > APART


@torch.no_grad()
def _dice_in_training(subject: Subject, segmenter: Segmenter) -> float:
    """Mean Dice of the slices by training's own forward pass, targets and mode, with the weights as they are now."""
    segmenter.train()
    cutoff = subject.config.predict.threshold
    dices = []
    for batch in subject.batches(segmenter):
        masks = segmenter(batch.z, batch.boxes).logits.sigmoid() > cutoff
        both = (masks & batch.masks).sum(dim=(0, 2, 3))
        total = masks.sum(dim=(0, 2, 3)) + batch.masks.sum(dim=(0, 2, 3))
        dices.append(float(torch.where(total > 0, 2 * both / total.clamp(min=1), 1.0).mean()))
    segmenter.eval()
    return float(np.mean(dices))


def _declared(segmenter: Segmenter) -> set[str]:
    own = {name for name, p in segmenter.fusion.named_parameters(prefix="fusion") if p.requires_grad}
    if own and len(segmenter.modalities) == 1:
        own = set()  # the weight of a single modality is 1 whatever it is
    return {tensor.name for tensor in segmenter.adaptation.report.tensors} | own


def _lacks_decoder(subject: Subject, declared: set[str]) -> bool:
    config = subject.config.method
    asked = "decoder" in method_spec(config.name).options and config.decoder != "frozen"
    return asked and not any(name.startswith("mask_decoder") for name in declared)


def _parameters(segmenter: Segmenter) -> dict[str, torch.nn.Parameter]:
    return dict(segmenter.sam.named_parameters()) | dict(segmenter.fusion.named_parameters(prefix="fusion"))


def _tensors(segmenter: Segmenter) -> dict[str, Tensor]:
    """Copies of everything in the model, buffers included, by the names of `_declared`."""
    buffers = dict(segmenter.sam.named_buffers())
    return {name: t.detach().clone() for name, t in (_parameters(segmenter) | buffers).items()}


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().sum() > 0)


def _few(curve: list[dict[str, Any]], most: int = 8) -> list[dict[str, Any]]:
    if len(curve) <= most:
        return curve
    return [curve[round(n * (len(curve) - 1) / (most - 1))] for n in range(most)]
