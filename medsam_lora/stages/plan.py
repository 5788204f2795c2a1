"""What a training run will take, before it is started: parameters, memory, and the largest batch for a card.

The step is gone through on torch's fake tensors (`models.footprint`), so that the answer is that of the code which will
run, in seconds, on any machine, and without the card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from medsam_lora.config import Config
from medsam_lora.models.footprint import MIB, Footprint, StepOptions, dry
from medsam_lora.models.sam import check_attention
from medsam_lora.models.weights import model_spec
from medsam_lora.transforms.resizing import covered_frame

ASSUMED_CROP = 150, 200
"""A brain box in voxels, where the configuration leaves it to be fitted: about that of BraTS."""

USABLE = {"cpu": 0.5, "cuda": 0.9}
"""Share of a memory that a step's tensors may fill. On the CPU the gaps that short-lived tensors leave between those
that are kept are not used again: resident memory grows by 1.3 to 1.9 times the bytes of the tensors (glibc)."""

_FLOAT = 4
_ADAM_COPIES = 2  # its two moments, for each trainable parameter


def plan(config: Config, *, device: str = "cpu", memory_gib: float | None = None) -> dict[str, Any]:
    """Predict a run's memory.

    Parameters
    ----------
    config : Config
    device : {"cpu", "cuda"}
        Where it will run, which decides how attention is computed.
    memory_gib : float, optional
        Of the device; the largest batch is for the share of it in `USABLE`.

    Returns
    -------
    dict
        Plain data: ``parameters``, ``trainable``, ``images_per_step`` (of a process), ``processes``, ``frame``,
        ``crop``, ``saved_mib`` (kept for the backward pass), ``peak_mib`` (tensors: weights, gradients, optimiser and
        the largest moment of a step; not the interpreter, libraries, a CUDA context or what an allocator holds back,
        for which see `USABLE`), ``largest_batch`` (slices of all processes, None without `memory_gib`, 0 where one does
        not fit), ``tflop_per_step`` (None for CUDA), ``settings``, ``device``.
    """
    model, train = config.model, config.train
    check_attention(model.name, model.grid, model.attention)
    size = model.image_size or model_spec(model.name).image_size
    crop = _crop(config)
    amp = ("bf16" if device == "cuda" else "none") if train.amp == "auto" else train.amp
    step = StepOptions(
        model.name,
        config.method,
        covered_frame(crop, size) if model.grid == "unpadded" else (size, size),
        1,
        size,
        amp,
        model.attention,
        train.checkpointing,
        device,
    )
    one, two = dry(step), dry(replace(step, images=2))
    n_modalities = len(config.data.modalities)
    # Each process has the model, and its share of a batch; on the CPU they share the memory.
    images = math.ceil(train.batch_size / train.processes) * n_modalities
    fixed = _FLOAT * (one.parameters + _ADAM_COPIES * one.trainable)

    def peak(n: int) -> int:
        return fixed + _at(one.peak_bytes, two.peak_bytes, n)

    largest = None
    if memory_gib is not None:
        room = USABLE[device] * memory_gib * 1024 * MIB / (train.processes if device == "cpu" else 1)
        per_slice = peak(1 + n_modalities) - peak(1)
        first = peak(n_modalities)
        largest = 0 if first > room else train.processes * (1 + int((room - first) // max(1, per_slice)))
    return {
        "settings": _settings(config),
        "device": device,
        "amp": amp,
        "parameters": one.parameters,
        "trainable": one.trainable,
        "images_per_step": images,
        "processes": train.processes,
        "crop": list(crop),
        "crop_assumed": config.crop.name == "brain_box" and config.crop.size is None,
        "frame": list(step.frame),
        "saved_mib": round(_at(one.saved_bytes, two.saved_bytes, images) / MIB),
        "peak_mib": round(peak(images) / MIB),
        "largest_batch": largest,
        "memory_gib": memory_gib,
        "tflop_per_step": None if device == "cuda" else round(images * _flops(one) / 1e12, 3),
    }


def as_text(info: Mapping[str, Any]) -> str:
    """What `plan` found, for people."""
    found = info
    batch = found["images_per_step"] // len(found["settings"]["modalities"])
    crop = " x ".join(map(str, found["crop"])) + (" (assumed: crop.size is not set)" if found["crop_assumed"] else "")
    each = "" if found["processes"] == 1 else f"in each of {found['processes']} processes "
    settings = {k: v for k, v in found["settings"].items() if k != "modalities"}
    beside = "; resident up to twice that, and the interpreter" if found["device"] == "cpu" else ", and a CUDA context"
    lines = [
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        f"on          {found['device']}, autocast {found['amp']}",
        f"parameters  {found['parameters']:,}, of which {found['trainable']:,} are trained",
        f"step        {each}{batch} slices of {len(found['settings']['modalities'])} modalities: "
        f"{found['images_per_step']} images of {found['frame'][0]} x {found['frame'][1]} px, crop {crop}",
        f"saved       {found['saved_mib']:,} MiB for the backward pass",
        f"peak        {found['peak_mib']:,} MiB of tensors" + beside,
    ]
    if found["tflop_per_step"] is not None:
        lines.append(f"operations  {found['tflop_per_step']:.3g} TFLOP a step")
    if found["largest_batch"] is not None:
        advice = "" if found["largest_batch"] else "; set train.checkpointing=true, or a smaller model.image_size"
        lines.append(f"largest     train.batch_size={found['largest_batch']} in {found['memory_gib']:g} GiB{advice}")
    return "\n".join(lines)


def _crop(config: Config) -> tuple[int, int]:
    if config.crop.name == "none":
        return 240, 240  # BraTS
    return config.crop.size or ASSUMED_CROP


def _settings(config: Config) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "grid": config.model.grid,
        "attention": config.model.attention,
        "method": config.method.name,
        "checkpointing": config.train.checkpointing,
        "modalities": list(config.data.modalities),
    }


def _at(one: int, two: int, images: int) -> int:
    """Bytes for any number of images, which they grow linearly with: autocast's copies of weights are there once."""
    return one + (images - 1) * (two - one)


def _flops(found: Footprint) -> int:
    return found.forward_flops + found.backward_flops
