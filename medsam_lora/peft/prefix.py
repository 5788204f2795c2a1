"""Learned keys and values beside the attention of every block, behind a gate that starts closed.

``out_h += tanh(g_h) softmax(q_h K_h^T / sqrt(d)) V_h`` for each head h, with p keys and values per block and head that
all windows share. Prefix tuning (Li and Liang 2021, arXiv 2101.00190) with the zero-initialised gate of LLaMA-Adapter
(Zhang et al. 2023, arXiv 2303.16199, section 3.2), written for SAM's windows: a softmax of its own leaves the relative
positions of the real keys, and at the start the base model, exactly as they are. K and V are parameters, never cached.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medsam_lora.config import MethodConfig
from medsam_lora.peft.attention import put_together, take_apart
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import linear, with_decoder
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.peft.sites import cache_point_before, chosen_sites

DEFAULT_TOKENS = 10


class GridPrefix(nn.Module):
    """A prefix of an attention that says where its heads are, and so keeps no N x N matrix (`heads_of`)."""

    scale: float
    prefix_k: nn.Parameter
    prefix_v: nn.Parameter
    prefix_gate: nn.Parameter

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor, places: Any) -> Tensor:
        """Heads of the base, with positions or a bias as it takes them, and of the prefix, (n, heads, N, d)."""
        out: Tensor = super().heads_of(q, k, v, places)  # type: ignore[misc]
        return out + _of_prefix(self, q * self.scale).to(out.dtype)


class GatedPrefix(nn.Module):
    """An attention with a gated prefix: mixed into the base's class by `extend`."""

    takes_grid = False  # an encoder that hands whole grids to its attention gives windows to this one
    prefix_k: nn.Parameter
    prefix_v: nn.Parameter
    prefix_gate: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(n, ..., C) to the same shape, for n windows."""
        parts = take_apart(self, x)
        out = parts.scores.softmax(dim=-1) @ parts.v
        return put_together(self, out + _of_prefix(self, parts.q), x)


def _of_prefix(prefix: GridPrefix | GatedPrefix, scaled: Tensor) -> Tensor:
    """What a prefix adds to the heads of scaled queries (n, heads, N, d)."""
    weights = (scaled @ prefix.prefix_k.transpose(-2, -1)).softmax(dim=-1)
    # The gate goes to the few values, not to the many tokens.
    return weights @ (torch.tanh(prefix.prefix_gate)[:, None, None] * prefix.prefix_v)


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Add a prefix to the chosen blocks of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `tokens` (p), `blocks`, `decoder`.
    generator : torch.Generator
        Of keys and values.
    """
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    tokens = config.tokens or DEFAULT_TOKENS
    edits: list[Edit] = []
    count = 0
    for site in sites:
        base = encoder.get_submodule(site.attention)
        like = linear(encoder, site.proj).weight
        on_grid = hasattr(base, "heads_of")
        adapted: GridPrefix | GatedPrefix = extend(base, GridPrefix) if on_grid else extend(base, GatedPrefix)
        for name, rows in (("prefix_k", site.k), ("prefix_v", site.v)):
            width = sum(len(part) for part in rows) // site.heads
            # Scores and values of the size of one feature of a unit vector.
            drawn = torch.randn(site.heads, tokens, width, generator=generator) * width**-0.5
            adapted.register_parameter(name, nn.Parameter(drawn.to(like)))
            count += site.heads * tokens * width
        adapted.register_parameter("prefix_gate", nn.Parameter(like.new_zeros(site.heads)))
        count += site.heads
        edits.append(Edit(f"image_encoder.{site.attention}", base, adapted, "encoder"))
    return with_decoder(model, config, generator, edits, count, cache_point=cache_point_before(sites))
