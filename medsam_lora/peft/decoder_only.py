"""Train the whole mask decoder on embeddings of the frozen image encoder.

All of its tensors are trained (4,058,340 parameters in SAM), those of the multimask tokens and of the IoU head
included: the loss must therefore supervise all four mask tokens and the IoU estimate, or some would get no gradient.
"""

from __future__ import annotations

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.edits import train_whole


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Train ``mask_decoder`` from its base values. `generator` is not drawn from."""
    return Adaptation(
        model,
        config,
        train_whole(model, "mask_decoder", "decoder"),
        expected_count=sum(p.numel() for p in model.get_submodule("mask_decoder").parameters()),
        cache_point="embedding",
    )
