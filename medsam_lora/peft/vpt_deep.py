"""Learned tokens in every block that all windows attend to: deep visual prompt tuning for SAM.

In VPT-deep (Jia et al. 2022, arXiv 2203.12119, equation 6) what a block makes of its prompt tokens is thrown away
before the next, so that they act as further keys and values alone. Here p tokens per block go through the block's own
frozen LayerNorm and qkv, and their keys and values join those of every window, global attention included, under one
softmax. Relative positions hold between the image's cells only. The adapted model does not start as the base model: a
softmax over more keys is another one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.attention import join_softmax, put_together, take_apart
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import linear, with_decoder
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.peft.sites import AttentionSite, Rows, cache_point_before, chosen_sites

DEFAULT_TOKENS = 10
PATCH_VALUES = 3 * 16 * 16
"""Of a patch of SAM's, for VPT's start: uniform up to ``sqrt(6 / (values of a patch + width))``, after Xavier."""


class DeepPrompt(nn.Module):
    """An attention with prompt tokens: mixed into the base's class by `extend`."""

    takes_grid = False  # an encoder that hands whole grids to its attention gives windows to this one
    prompt_tokens: nn.Parameter
    prompt_site: AttentionSite
    prompt_norm: tuple[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """(n, ..., C) to the same shape, for n windows."""
        return put_together(self, join_softmax(take_apart(self, x), *_keys_and_values(self)), x)


class GridPrompt(nn.Module):
    """Prompt tokens of an attention whose heads take further keys, and that so keeps no N x N matrix (`heads_of`)."""

    prompt_tokens: nn.Parameter
    prompt_site: AttentionSite
    prompt_norm: tuple[nn.Module]

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor, positions: Any) -> Tensor:
        """Heads over the grid's tokens and the prompt's, (n, heads, N, d)."""
        out: Tensor = super().heads_of(q, k, v, positions, _keys_and_values(self))  # type: ignore[misc]
        return out


def _keys_and_values(prompt: DeepPrompt | GridPrompt) -> tuple[Tensor, Tensor]:
    """Of the tokens, through the block's own norm and qkv: (heads, p, d) each."""
    # In a tuple, where torch does not see it: the LayerNorm belongs to the block.
    (norm,) = prompt.prompt_norm
    qkv = prompt.get_submodule("qkv")(norm(prompt.prompt_tokens))
    site = prompt.prompt_site
    k, v = (_of_heads(qkv, rows, site.heads) for rows in (site.k, site.v))
    return k, v


def _of_heads(qkv: Tensor, rows: Rows, heads: int) -> Tensor:
    """Some output rows of the tokens' qkv, (p, rows), as (heads, p, d)."""
    chosen = torch.cat([qkv[:, part.start : part.stop] for part in rows], dim=1)
    return chosen.unflatten(1, (heads, -1)).transpose(0, 1)


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Add prompt tokens to the chosen blocks of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `tokens` (p), `blocks`, `decoder`.
    generator : torch.Generator
        Of the tokens.
    """
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    tokens = config.tokens or DEFAULT_TOKENS
    edits: list[Edit] = []
    for site in sites:
        base = encoder.get_submodule(site.attention)
        on_grid = getattr(base, "takes_grid", False)
        adapted: GridPrompt | DeepPrompt = extend(base, GridPrompt) if on_grid else extend(base, DeepPrompt)
        bound = math.sqrt(6 / (PATCH_VALUES + site.dim_in))
        drawn = torch.empty(tokens, site.dim_in).uniform_(-bound, bound, generator=generator)
        drawn = drawn.to(linear(encoder, site.proj).weight)
        adapted.register_parameter("prompt_tokens", nn.Parameter(drawn))
        adapted.prompt_site = site
        adapted.prompt_norm = (encoder.get_submodule(site.norm),)
        edits.append(Edit(f"image_encoder.{site.attention}", base, adapted, "encoder"))
    return with_decoder(
        model,
        config,
        generator,
        edits,
        sum(tokens * site.dim_in for site in sites),
        cache_point=cache_point_before(sites),
    )
