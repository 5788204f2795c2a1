"""What a training run will take, before it is started: parameters, memory, and the largest batch for a card.

The step is gone through on torch's fake tensors (`models.footprint`), so that the answer is that of the code which will
run, in seconds to a minute, on any machine, and without the card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
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
that are kept are not used again: resident memory grows by 1.3 to 2.1 times the bytes of the tensors (glibc)."""

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
    n_modalities = len(config.data.modalities)
    # Each process has the model, and its share of a batch; on the CPU they share the memory.
    images = math.ceil(train.batch_size / train.processes) * n_modalities

    @cache
    def counted(images: int) -> Footprint:
        return dry(replace(step, images=images))

    found = counted(images)
    largest = None
    if memory_gib is not None:
        room = USABLE[device] * memory_gib * 1024 * MIB / (train.processes if device == "cpu" else 1)
        largest = train.processes * largest_within(int(room), lambda slices: _peak(counted(slices * n_modalities)))
    return {
        "settings": _settings(config),
        "device": device,
        "amp": amp,
        "parameters": found.parameters,
        "trainable": found.trainable,
        "images_per_step": images,
        "processes": train.processes,
        "crop": list(crop),
        "crop_assumed": config.crop.name == "brain_box" and config.crop.size is None,
        "frame": list(step.frame),
        "saved_mib": round(found.saved_bytes / MIB),
        "peak_mib": round(_peak(found) / MIB),
        "largest_batch": largest,
        "memory_gib": memory_gib,
        "tflop_per_step": None if device == "cuda" else round((found.forward_flops + found.backward_flops) / 1e12, 3),
    }


def largest_within(room: int, peak: Callable[[int], int]) -> int:
    """The largest number whose `peak` is within `room`, 0 where there is none.

    Parameters
    ----------
    room : int
    peak : callable
        Bytes for 1, 2, ... slices: the largest of several moments of a step, each of which grows linearly, some from
        more and some faster. So what two numbers promise for a third is never too little, and must be looked up.

    Examples
    --------
    >>> largest_within(1000, lambda n: max(100 + 10 * n, 30 * n))
    33
    """
    fits, at_fits = 1, peak(1)
    if at_fits > room:
        return 0
    slope = max(1, peak(2) - at_fits)
    # Where the line through the first two leaves the room: too many, or the very first that are.
    over = fits + (room - at_fits) // slope + 1
    at_over = peak(over)
    while at_over <= room:  # the line was not met to the byte
        fits, at_fits, over = over, at_over, 2 * over
        at_over = peak(over)
    while over - fits > 1:
        guess = fits + (room - at_fits) * (over - fits) // (at_over - at_fits)
        guess = min(max(guess, fits + 1), over - 1)
        at_guess = peak(guess)
        if at_guess <= room:
            fits, at_fits = guess, at_guess
        else:
            over, at_over = guess, at_guess
    return fits


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


def _peak(found: Footprint) -> int:
    return found.peak_bytes + _FLOAT * (found.parameters + _ADAM_COPIES * found.trainable)
