"""A bottleneck beside the perceptron of every block.

``mlp(n) + s W_up relu(W_down n + b_down) + s b_up`` with n the normalised input of the perceptron and s = 0.1 (Chen et
al. 2022, AdaptFormer, arXiv 2205.13535, equations 2 and 3). W_up starts at zero.
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


class Parallel(nn.Module):
    """A perceptron with a bottleneck beside it: mixed into the base's class by `extend`."""

    adapter: nn.Module
    adapter_scale: float
    adapter_norm: str

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        # Where the LayerNorm stands inside the perceptron (TinyViT), the branch passes it as well.
        n = self.get_submodule(self.adapter_norm)(x) if self.adapter_norm else x
        out: Tensor = super().forward(x) + self.adapter_scale * self.adapter(n)
        return out


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Put a bottleneck beside the perceptrons of the chosen blocks of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `bottleneck`, `adapter_scale`, `blocks`, `decoder`.
    generator : torch.Generator
        Of W_down and its bias.
    """
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    mlps = {site.block: site for site in mlp_sites(encoder)}
    inner = config.bottleneck or DEFAULT_BOTTLENECK
    edits: list[Edit] = []
    count = 0
    for mlp in (mlps[site.block] for site in sites):
        base, first = encoder.get_submodule(mlp.name), linear(encoder, mlp.fc1)
        adapted = extend(base, Parallel)
        adapted.adapter = bottleneck(first.in_features, inner, nn.ReLU(), first.weight, generator)
        adapted.adapter_scale = config.adapter_scale
        adapted.adapter_norm = mlp.norm.removeprefix(f"{mlp.name}.")
        edits.append(Edit(f"image_encoder.{mlp.name}", base, adapted, "encoder"))
        count += bottleneck_count(first.in_features, inner)
    return with_decoder(model, config, generator, edits, count, cache_point=cache_point_before(sites))
