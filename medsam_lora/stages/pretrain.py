"""Pre-training of vit_nano on synthetic shapes, once per output folder."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import torch

from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import choose_device
from medsam_lora.models.sam import build
from medsam_lora.stages.pipeline import PretrainSection
from medsam_lora.training.pretrain import pretrain

logger = logging.getLogger(__name__)

_LOG_EVERY = 50


def pretrain_nano(folder: Path, section: PretrainSection, device: str) -> Path:
    """Train vit_nano on shapes and write its checkpoint; the same settings are not trained twice.

    Parameters
    ----------
    folder : Path
        Receives ``vit_nano.pt`` and ``pretrain.json``.
    section : PretrainSection
    device : str

    Returns
    -------
    Path
        The checkpoint, a stock SAM state dict.
    """
    weights, note = folder / "vit_nano.pt", folder / "pretrain.json"
    settings = section.model_dump(mode="json")
    if weights.is_file() and note.is_file() and json.loads(note.read_text()) == settings:
        return weights
    keep_freed_memory()
    logger.info("vit_nano has no weights of its own yet: training it on %d batches of shapes", section.steps)
    sam = build("vit_nano", "random", section.image_size, section.seed).to(choose_device(device))
    pretrain(sam, section.steps, section.batch_size, section.lr, section.seed, "auto", _note_step)
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in sam.state_dict().items()}, buffer)
    write_bytes_atomically(weights, buffer.getvalue())
    write_bytes_atomically(note, json.dumps(settings).encode())
    return weights


def _note_step(step: int, loss: float, iou: float) -> None:
    if step % _LOG_EVERY == 0:
        logger.info("shapes, step %d: loss %.3f, IoU %.3f", step, loss, iou)
