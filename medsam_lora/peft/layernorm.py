"""Train scale and shift of the LayerNorms of the image encoder, the neck's included.

Basu et al. 2023 (LN-tune, arXiv 2304.03094); for SAM a subset of what every table of baselines has. A BatchNorm
(TinyViT) is not a LayerNorm and stays frozen.
"""

from __future__ import annotations

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import with_decoder
from medsam_lora.peft.edits import Edit, train_whole
from medsam_lora.sam_modules import LayerNorm2d


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Train the LayerNorms from their base values. `generator` is drawn from for low-rank branches of the decoder."""
    edits: list[Edit] = []
    count = 0
    for name, module in model.get_submodule("image_encoder").named_modules():
        if isinstance(module, nn.LayerNorm | LayerNorm2d):
            edits += train_whole(model, f"image_encoder.{name}", "encoder")
            count += 2 * (module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else len(module.weight))
    return with_decoder(model, config, generator, edits, count)
