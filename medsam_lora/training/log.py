"""The lines of ``log.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from medsam_lora.models.segmenter import Segmenter
from medsam_lora.training.guards import peak_memory_mib

LOG_COLUMNS = (
    "epoch",
    "loss",
    "loss_dice",
    "loss_bce",
    "loss_focal",
    "loss_iou",
    "train_dice",
    "train_area_ratio",
    "val_dice",
    "val_area_ratio",
    "lr_encoder",
    "lr_decoder",
    "grad_norm",
    "images_per_s",
    "peak_memory_mib",
    "duration_s",
    "updates",
)
"""Columns of ``log.csv``."""


def train_row(
    epoch: int, sums: Mapping[str, float], optimiser: torch.optim.Optimizer, segmenter: Segmenter, duration_s: float
) -> dict[str, Any]:
    """The line of an epoch, but for its validation.

    Parameters
    ----------
    epoch : int
    sums : mapping of str to float
        Over the slices of the epoch, and their number as ``slices``.
    optimiser : Optimizer
        With named groups.
    segmenter : Segmenter
    duration_s : float
    """
    n = max(sums.get("slices", 0.0), 1.0)
    row: dict[str, Any] = {"epoch": epoch}
    for name in ("loss", "loss_dice", "loss_bce", "loss_focal", "loss_iou", "train_dice"):
        row[name] = sums.get(name, 0.0) / n
    row["train_area_ratio"] = sums.get("predicted_voxels", 0.0) / max(sums.get("reference_voxels", 0.0), 1.0)
    rates = {group["name"]: group["lr"] for group in optimiser.param_groups}
    for part in ("encoder", "decoder"):
        # A method with learning rates of its own is shown by its first group.
        first = next((rate for name, rate in rates.items() if name.startswith((f"{part}.", f"{part}/"))), None)
        row[f"lr_{part}"] = rates.get(part, first)
    row["grad_norm"] = sums.get("grad_norm", 0.0) / max(sums.get("updates", 0.0), 1.0)
    row["images_per_s"] = n * len(segmenter.modalities) / duration_s
    row["peak_memory_mib"] = peak_memory_mib(segmenter.device)
    row["duration_s"] = duration_s
    row["updates"] = int(sums.get("updates", 0.0))
    return row
