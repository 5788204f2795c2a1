"""The TinyViT image encoder of MobileSAM.

Written from the published architectures: TinyViT-5M (Wu et al., ECCV 2022, arXiv 2207.10666, Section 3), the attention
with offset-indexed biases that it takes from LeViT (Graham et al., ICCV 2021, arXiv 2104.01136, Section 4.4), and the
changes of MobileSAM (Zhang et al., arXiv 2306.14289): no down-sampling before the last stage, and the neck of SAM in
place of the classifier. Module names are those of the published checkpoint, so that it loads strictly.

The grid holds channels last, ``(B, H, W, C)``, from the second stage on; the convolutions between see it as a
`channels_last` tensor without a copy.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsam_lora.models.attention import kept_by_fused, runs_on
from medsam_lora.models.attention_windows import windowed
from medsam_lora.models.vit import run_block
from medsam_lora.peft.sites import AttentionSite, MlpSite, rows_per_head
from medsam_lora.sam_modules import LayerNorm2d

DROPPED_KEYS: Final = (
    "image_encoder.norm_head.weight",
    "image_encoder.norm_head.bias",
    "image_encoder.head.weight",
    "image_encoder.head.bias",
)
"""Keys of `mobile_sam.pt` that belong to the ImageNet classifier, which the encoder does not have. Exactly these."""

WIDTHS: Final = (64, 128, 160, 320)
DEPTHS: Final = (2, 2, 6, 2)
HEADS: Final = (2, 4, 5, 10)
WINDOWS: Final = (7, 7, 14, 7)
MLP_RATIO: Final = 4
STRIDE: Final = 16
"""Pixels per cell of the embedding: 4 (patch embedding) x 2 x 2 (the first two mergings)."""


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that is always in eval: `train()` neither switches it nor moves its running statistics.

    With one patient per batch, batch statistics would make a slice's mask depend on the slices beside it.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.training = False  # modules are born in training

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stay in eval, whatever `mode` says."""
        super().train(False)
        return self


class ConvNorm(nn.Module):
    """Convolution without bias and a frozen BatchNorm, (B, C, H, W) to (B, C', H', W').

    The normalisation is an affine map per output channel, so it is folded into the kernel at every forward: the same
    function (gradients included) for one pass over the image fewer, and the stored tensors stay as published.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = FrozenBatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        # An adaptation that only changes the kernel says so; of any other, its own forward must run.
        reconstructed = getattr(self.c, "reconstructed", None)
        if reconstructed is None and type(self.c) is not nn.Conv2d:
            return self.bn(self.c(x))
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None  # track_running_stats is on
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight = self.c.weight if reconstructed is None else reconstructed()
        kernel = weight * scale[:, None, None, None]
        bias = self.bn.bias - mean * scale
        return F.conv2d(x, kernel, bias, self.c.stride, self.c.padding, self.c.dilation, self.c.groups)


class PatchEmbed(nn.Module):
    """Two strided 3x3 convolutions, (B, 3, S, S) to (B, outputs, S/4, S/4)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, outputs // 2, 3, 2), nn.GELU(), ConvNorm(outputs // 2, outputs, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck with expansion 4 (MobileNetV2), (B, C, H, W) to the same shape."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = width * expansion
        self.conv1 = ConvNorm(width, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvNorm(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class PatchMerging(nn.Module):
    """Change of width and, with stride 2, halving of the grid, (B, C, H, W) to (B, C', H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class ConvStage(nn.Module):
    """The first stage: inverted bottlenecks and a merging."""

    def __init__(self, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(width) for _ in range(depth))
        self.downsample = PatchMerging(width, outputs, stride=2)

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, checkpointing)
        return self.downsample(x)


def offset_index(window: int) -> Tensor:
    """Row of the bias table for every pair of cells of a window.

    The bias depends on the absolute offset alone: ``|row_a - row_b| * window + |column_a - column_b|``.

    Returns
    -------
    Tensor of int64, shape (window**2, window**2)

    Examples
    --------
    >>> offset_index(2).tolist()
    [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]
    """
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    return (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()


class Attention(nn.Module):
    """Multi-head attention inside windows, (n, N, C) to the same shape with N cells in each of n windows.

    The fused `qkv` is laid out per head: its rows are q, k and v of head 0, then q, k and v of head 1, and so on
    (SAM's ViT has all q, then all k, then all v).

    Attributes
    ----------
    fused : bool
        One call of torch's on the CPU too, as graph exporters need it.
    """

    bias_index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.fused = False
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        # Not in the published checkpoint: it follows from the window.
        self.register_buffer("bias_index", offset_index(window), persistent=False)

    def attention_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, (n, heads, N, d), and what is added to their scores, (heads, N, N)."""
        windows, cells, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(windows, cells, self.num_heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        return q, k, v, self.attention_biases[:, self.bias_index]

    def forward(self, x: Tensor) -> Tensor:
        out = self.heads_of(*self.attention_parts(x))
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """The heads of all windows, (n, heads, N, d): where an adaptation adds to them; see `attention_parts`."""
        where = runs_on(q)
        if where != q.device.type:  # planned for a GPU, which keeps no mask for each window
            return kept_by_fused(q, k, v)
        # On the CPU pieces are faster than the fused kernel, which checks the mask for -inf, and keep no scores.
        if self.fused or where != "cpu":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return windowed(q, k, v, bias)


class Mlp(nn.Module):
    """LayerNorm and two linear layers with GELU between, on the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Windowed attention, a local 3x3 convolution, an MLP, on (B, H, W, C)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, heads, window)
        self.mlp = Mlp(width, MLP_RATIO * width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)

    def attended(self, x: Tensor) -> Tensor:
        """What attention adds to x."""
        batch, height, width, channels = x.shape
        w = self.window
        down, across = math.ceil(height / w), math.ceil(width / w)
        # Zeros come before the LayerNorm inside the attention and are not masked out, as in the published model.
        x = F.pad(x, (0, 0, 0, across * w - width, 0, down * w - height))
        x = x.view(batch, down, w, across, w, channels).transpose(2, 3).reshape(-1, w * w, channels)
        x = self.attn(x)
        x = x.view(batch, down, across, w, w, channels).transpose(2, 3)
        return x.reshape(batch, down * w, across * w, channels)[:, :height, :width]


class AttentionStage(nn.Module):
    """Blocks of windowed attention and, but for the last stage, a change of width."""

    def __init__(self, width: int, depth: int, heads: int, window: int, merge: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyViTBlock(width, heads, window) for _ in range(depth))
        self.downsample = merge

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, checkpointing)
        if self.downsample is None:
            return x
        return self.downsample(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TinyViT(nn.Module):
    """MobileSAM's image encoder, (B, 3, h, w) normalised pixels to (B, 256, h/16, w/16).

    It has no absolute positions, so any h and w that are multiples of 16 work with the same tensors.

    Parameters
    ----------
    img_size : int
        S, kept as an attribute for those that ask (as SAM's `ImageEncoderViT` does).

    Attributes
    ----------
    checkpointing : bool
        Keep nothing of a block for the backward pass but its input, and run it once more there.
    """

    def __init__(self, img_size: int = 1024, out_chans: int = 256) -> None:
        super().__init__()
        self.img_size = img_size
        self.checkpointing = False
        self.patch_embed = PatchEmbed(WIDTHS[0])
        mergings = [PatchMerging(WIDTHS[1], WIDTHS[2], stride=2), PatchMerging(WIDTHS[2], WIDTHS[3], stride=1), None]
        self.layers = nn.ModuleList([ConvStage(WIDTHS[0], DEPTHS[0], WIDTHS[1])])
        for stage, merge in enumerate(mergings, start=1):
            self.layers.append(AttentionStage(WIDTHS[stage], DEPTHS[stage], HEADS[stage], WINDOWS[stage], merge))
        self.neck = nn.Sequential(
            nn.Conv2d(WIDTHS[-1], out_chans, 1, bias=False),
            LayerNorm2d(out_chans),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            LayerNorm2d(out_chans),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels.contiguous(memory_format=torch.channels_last))
        x = self.layers[0](x, self.checkpointing).permute(0, 2, 3, 1)
        for stage in list(self.layers)[1:]:
            x = stage(x, self.checkpointing)
        return self.neck(x.permute(0, 3, 1, 2))

    def attention_sites(self) -> list[AttentionSite]:
        """Where a method may attach to the attention: the ten blocks of stages 1 to 3, in the order they run."""
        sites = []
        for index, (name, block) in enumerate(self._attention_blocks()):
            attn, width = f"{name}.attn", block.attn.qkv.in_features
            heads = block.attn.num_heads
            q, k, v = rows_per_head(heads, width // heads)
            linears = f"{attn}.qkv", f"{attn}.proj"
            sites.append(AttentionSite(index, *linears, width, heads, q, k, v, False, name, attn, f"{attn}.norm"))
        return sites

    def mlp_sites(self) -> list[MlpSite]:
        """The perceptrons of the same blocks."""
        return [
            MlpSite(index, f"{name}.mlp.fc1", f"{name}.mlp.fc2", f"{name}.mlp", f"{name}.mlp.norm")
            for index, (name, _) in enumerate(self._attention_blocks())
        ]

    def neck_convolutions(self) -> list[str]:
        """The convolutions of the neck."""
        return ["neck.0", "neck.2"]

    def patch_convolutions(self) -> list[str]:
        """The convolutions of the patch embedding."""
        return ["patch_embed.seq.0.c", "patch_embed.seq.2.c"]

    def _attention_blocks(self) -> list[tuple[str, TinyViTBlock]]:
        # Blocks are registered, and so named, in the order they run.
        return [(name, module) for name, module in self.named_modules() if isinstance(module, TinyViTBlock)]
