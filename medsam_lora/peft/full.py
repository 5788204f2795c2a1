"""Train the whole image encoder and mask decoder.

The prompt encoder stays frozen: a box prompt uses two of its embeddings only, and MedSAM, whose recipe this is, keeps
it frozen too (arXiv 2304.12306). Running statistics of BatchNorm (TinyViT) are buffers, not
parameters: they are neither trained nor saved, and the encoder keeps BatchNorm in evaluation mode.

The base values are kept beside the trained ones (twice the weight memory), since `disable` and `detach` need them.
"""

from __future__ import annotations

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.edits import train_whole


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Train ``image_encoder`` and ``mask_decoder`` from their base values. `generator` is not drawn from."""
    edits = train_whole(model, "image_encoder", "encoder") + train_whole(model, "mask_decoder", "decoder")
    parts = [model.get_submodule("image_encoder"), model.get_submodule("mask_decoder")]
    return Adaptation(model, config, edits, expected_count=sum(p.numel() for part in parts for p in part.parameters()))
