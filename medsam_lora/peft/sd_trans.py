"""Attention over neighbouring slices beside the attention within a slice, with three adapters in every block.

Wu et al. 2023, Medical SAM Adapter (arXiv 2304.12620, section 3.2, SD-Trans). A block of the encoder is given stacks of
D slices. With n the normalised input it computes

    x + S(attention(n)) + P(depth(n)),   then   x + mlp(m) + 0.5 A(m)   with m the normalised sum,

where `depth` lets each cell attend to the same cell of the other slices of its stack, by the block's own frozen qkv and
projection without the relative positions of the plane; S (with a skip), P and A (without) are bottlenecks of a quarter
of the width, whose up-projections start at zero. With D = 1 there is no depth branch and no P.

Other than in the published version the depth branch is computed before the plane is cut into windows, so that a cell
meets its own neighbours and not those of another window; D is explicit, so that slices of two cases in one batch never
meet; and the adapted model starts as the base model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError, ConfigError
from medsam_lora.peft.adapter import Serial
from medsam_lora.peft.adaptformer import Parallel
from medsam_lora.peft.contract import Adaptation
from medsam_lora.peft.decoder import linear, with_decoder
from medsam_lora.peft.drawing import bottleneck, bottleneck_count
from medsam_lora.peft.edits import Edit, extend
from medsam_lora.peft.sites import AttentionSite, MlpSite, cache_point_before, chosen_sites, mlp_sites
from medsam_lora.sam_modules import window_partition, window_unpartition

MLP_SCALE = 0.5


class Attended(nn.Module):
    """Upstream's block in two steps, the first of which has a name: mixed into its class by `extend`."""

    norm1: nn.Module
    norm2: nn.Module
    attn: nn.Module
    mlp: nn.Module
    window_size: int

    def attended(self, x: Tensor) -> Tensor:
        """What attention adds to x, (B, H, W, C)."""
        n = self.norm1(x)
        if not self.window_size:
            out: Tensor = self.attn(n)
            return out
        windows, padded = window_partition(n, self.window_size)
        joined: Tensor = window_unpartition(self.attn(windows), self.window_size, padded, tuple(x.shape[1:3]))
        return joined

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.attended(x)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DepthBlock(nn.Module):
    """A block with a depth branch: mixed into the base's class by `extend`."""

    depth: int
    depth_site: AttentionSite
    depth_adapter: nn.Module

    def attended(self, x: Tensor) -> Tensor:
        """What the block adds to x (B D, H, W, C) before its perceptron."""
        out: Tensor = super().attended(x) + self.depth_adapter(self.across(x))  # type: ignore[misc]
        return out

    def across(self, x: Tensor) -> Tensor:
        """Attention of every cell over its stack, (B D, H, W, C) to the same shape.

        Raises
        ------
        ValueError
            Where the images are not whole stacks.
        """
        images, height, width, _ = x.shape
        if images % self.depth:
            raise ValueError(f"{images} images are no stacks of {self.depth} slices")
        site = self.depth_site
        qkv, proj, norm = (self._part(name) for name in (site.qkv, site.proj, site.norm))
        fused = qkv(norm(x)).reshape(-1, self.depth, height * width, qkv.out_features)
        # (B, cells, heads, D, d): rows of q, k and v as the encoder lays them out.
        q, k, v = (
            torch.cat([fused[..., rows.start : rows.stop] for rows in part], dim=-1)
            .unflatten(-1, (site.heads, -1))
            .permute(0, 2, 3, 1, 4)
            for part in (site.q, site.k, site.v)
        )
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        out = (weights @ v).permute(0, 3, 1, 2, 4).reshape(images, height, width, -1)
        # The frozen Linear alone: the adapter behind it belongs to the branch within the slice.
        return functional.linear(out, proj.weight, proj.bias)

    def _part(self, name: str) -> Any:
        return self.get_submodule(name.removeprefix(f"{self.depth_site.name}."))


def attach(model: nn.Module, config: MethodConfig, generator: torch.Generator) -> Adaptation:
    """Add the depth branch and the adapters to the chosen blocks of ``image_encoder``.

    Parameters
    ----------
    model : Module
    config : MethodConfig
        `depth` (D, odd), `bottleneck`, `blocks`, `decoder`.
    generator : torch.Generator
        Of the down-projections.

    Raises
    ------
    ConfigError
        Where the depth is even: a stack has a slice in its middle.
    AdapterError
        Where the encoder's blocks do not say what they add before their perceptron.
    """
    if config.depth % 2 == 0:
        raise ConfigError(
            f"method.depth is {config.depth}: a stack of slices needs one in its middle",
            remedy=f"Set method.depth to {config.depth - 1} or {config.depth + 1}.",
        )
    encoder = model.get_submodule("image_encoder")
    sites = chosen_sites(encoder, config.blocks)
    mlps = {site.block: site for site in mlp_sites(encoder)}
    edits: list[Edit] = []
    count = 0
    for site in sites:
        inner = config.bottleneck or max(1, site.dim_in // 4)
        edits += _block_edits(encoder, site, mlps[site.block], config.depth, inner, generator)
        count += (3 if config.depth > 1 else 2) * bottleneck_count(site.dim_in, inner)
    return with_decoder(
        model, config, generator, edits, count, cache_point=cache_point_before(sites), depth=config.depth
    )


def _block_edits(
    encoder: nn.Module, site: AttentionSite, mlp: MlpSite, depth: int, inner: int, generator: torch.Generator
) -> list[Edit]:
    """The edits of one block; `inner` is the width of its bottlenecks."""
    proj, perceptron = linear(encoder, site.proj), encoder.get_submodule(mlp.name)
    space = extend(proj, Serial)
    space.adapter = bottleneck(site.dim_in, inner, nn.GELU(), proj.weight, generator)
    beside = extend(perceptron, Parallel)
    beside.adapter = bottleneck(site.dim_in, inner, nn.GELU(), proj.weight, generator)
    beside.adapter_scale, beside.adapter_norm = MLP_SCALE, mlp.norm.removeprefix(f"{mlp.name}.")
    edits = [
        Edit(f"image_encoder.{site.proj}", proj, space, "encoder"),
        Edit(f"image_encoder.{mlp.name}", perceptron, beside, "encoder"),
    ]
    if depth > 1:
        block = encoder.get_submodule(site.name)
        stacked = _stacked(block)
        stacked.depth, stacked.depth_site = depth, site
        stacked.depth_adapter = bottleneck(site.dim_in, inner, nn.GELU(), proj.weight, generator)
        edits.append(Edit(f"image_encoder.{site.name}", block, stacked, "encoder"))
    return edits


def _stacked(block: nn.Module) -> DepthBlock:
    if hasattr(block, "attended"):
        return extend(block, DepthBlock)
    # Upstream's own block.
    if all(hasattr(block, name) for name in ("norm1", "norm2", "attn", "mlp", "window_size")):
        return extend(extend(block, Attended), DepthBlock)
    raise AdapterError(
        f"the block {type(block).__name__} does not say what it adds before its perceptron",
        remedy="Give it a method attended(x), and let its forward use it.",
    )
