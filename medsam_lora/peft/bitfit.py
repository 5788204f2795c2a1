"""Train the biases of the image encoder and nothing else of it.

BitFit (Ben Zaken et al. 2021, arXiv 2106.10199). Biases are those of Linears, convolutions and normalisations; tables
of positions are none.
"""

from __future__ import annotations

import torch
from torch import nn

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import with_decoder
from medsam_lora.peft.edits import Edit
from medsam_lora.sam_modules import LayerNorm2d


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Train the biases from their base values. `generator` is drawn from for low-rank branches of the decoder."""
    edits: list[Edit] = []
    count = 0
    for name, module in model.get_submodule("image_encoder").named_modules():
        bias = module._parameters.get("bias")
        if bias is not None:
            edits.append(Edit(f"image_encoder.{name}.bias", bias, nn.Parameter(bias.detach().clone()), "encoder"))
            count += _features(name, module)
    return with_decoder(model, config, generator, edits, count)


def _features(name: str, module: nn.Module) -> int:
    """Output features of a layer, each of which has a bias."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features
    if isinstance(module, nn.LayerNorm):
        return torch.Size(module.normalized_shape).numel()
    if isinstance(module, LayerNorm2d):
        return len(module.weight)
    raise AdapterError(f"image_encoder.{name} has a bias, but is a {type(module).__name__}, which bitfit does not know")
