"""Nothing is trained: the base model, through the same contract, so that it is run and scored like the methods."""

from __future__ import annotations

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Freeze the whole model. `generator` is not drawn from."""
    return Adaptation(model, config, [], expected_count=0, cache_point="embedding")
