"""Serial bottleneck adapters after attention and perceptron of every block.

``h + W_up gelu(W_down h + b_down) + b_up`` (Houlsby et al. 2019, arXiv 1902.00751, section 2.1), where h is what the
attention, and then the perceptron, gives before it is added to the residual stream. W_up starts at zero, so the adapted
model starts as the base model (a published SAM version starts it at random, which undoes the pretraining at step 0).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import linear, with_decoder
from medsam_lora.peft.drawing import bottleneck, bottleneck_count
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.peft.sites import cache_point_before, chosen_sites, mlp_sites

DEFAULT_BOTTLENECK = 64


class Serial(nn.Module):
    """A Linear followed by an adapter: mixed into the base's class by `extend`."""

    adapter: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) to (..., n_out)."""
        h: Tensor = super().forward(x)
        out: Tensor = h + self.adapter(h)
        return out


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Put two adapters into the chosen blocks of ``image_encoder``, behind the last Linear of each part.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `bottleneck`, `blocks`, `decoder`.
    generator : torch.Generator
        Of W_down and its bias.
    """
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    mlps = {site.block: site for site in mlp_sites(encoder)}
    inner = config.bottleneck or DEFAULT_BOTTLENECK
    edits: list[Edit] = []
    count = 0
    for site in sites:
        for name in (site.proj, mlps[site.block].fc2):
            base = linear(encoder, name)
            adapted = extend(base, Serial)
            adapted.adapter = bottleneck(base.out_features, inner, nn.GELU(), base.weight, generator)
            edits.append(Edit(f"image_encoder.{name}", base, adapted, "encoder"))
            count += bottleneck_count(base.out_features, inner)
    return with_decoder(model, config, generator, edits, count, cache_point=cache_point_before(sites))
