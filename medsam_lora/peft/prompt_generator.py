"""A convolutional branch in front of every block: what SAM-PARSER's table of methods calls "Adapter".

``block(x + f(x))`` with f = Conv 1x1 (C to C/4), LayerNorm, GELU, depthwise Conv 3x3 without bias, LayerNorm, GELU,
Conv 1x1 (C/4 to C), LayerNorm, GELU: 299,904 parameters per block of 768 features, 3514.5 Ki in ViT-B, as in Table 4 of
Peng et al. 2023 (SAM-PARSER, arXiv 2308.14604). The layout was deduced from those counts. Scale and shift of the last
LayerNorm start at zero here, so that the adapted model starts as the base model; the published one does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import linear, with_decoder
from medsam_lora.peft.drawing import draw_convolution
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.peft.sites import cache_point_before, chosen_sites
from medsam_lora.sam_modules import LayerNorm2d


class Generated(nn.Module):
    """A block with a branch in front of it: mixed into the base's class by `extend`."""

    prompt_generator: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        added = self.prompt_generator(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = super().forward(x + added)
        return out


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Put a branch in front of the chosen blocks of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `bottleneck`, `blocks`, `decoder`.
    generator : torch.Generator
        Of the convolutions.
    """
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    edits: list[Edit] = []
    count = 0
    for site in sites:
        base = encoder.get_submodule(site.name)
        width = site.dim_in
        inner = config.bottleneck or width // 4
        adapted = extend(base, Generated)
        adapted.prompt_generator = _branch(width, inner, linear(encoder, site.proj).weight, generator)
        edits.append(Edit(f"image_encoder.{site.name}", base, adapted, "encoder"))
        # 1x1 down with bias, two LayerNorms of `inner`, 3x3 depthwise, 1x1 up with bias, LayerNorm of `width`.
        count += (width * inner + inner) + 2 * 2 * inner + 9 * inner + (inner * width + width) + 2 * width
    return with_decoder(model, config, generator, edits, count, cache_point=cache_point_before(sites))


def _branch(width: int, inner: int, like: Tensor, generator: torch.Generator) -> nn.Sequential:
    last = _norm(width, like)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        draw_convolution(width, inner, 1, like, generator),
        _norm(inner, like),
        nn.GELU(),
        draw_convolution(inner, inner, 3, like, generator, groups=inner, bias=False),
        _norm(inner, like),
        nn.GELU(),
        draw_convolution(inner, width, 1, like, generator),
        last,
        nn.GELU(),
    )


def _norm(width: int, like: Tensor) -> LayerNorm2d:
    layer = LayerNorm2d(width)
    # Not layer.to(like), which cannot put one fake tensor (`models.footprint.dry`) in the place of another.
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach().to(like)))
    return layer
