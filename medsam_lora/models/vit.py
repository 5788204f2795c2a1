"""SAM's ViT image encoder around upstream's own parts: the same function and the same tensors, at less cost.

What differs from `segment_anything.modeling.image_encoder`: attention keeps no N x N matrix for the backward pass
(`attention`); queries, keys and values are projected before the image is cut into windows, and heads are joined and
projected after it is put together again, so that no projection runs on the padding of windows; a grid that is smaller
than the trained one takes its part of the position tables; blocks can be checkpointed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from medsam_lora.models import attention
from medsam_lora.models.attention_choice import choose
from medsam_lora.models.attention_chunks import chunked
from medsam_lora.models.compiling import call_of_blocks
from medsam_lora.models.positions import Positions, relative_positions
from medsam_lora.sam_modules import ImageEncoderViT


class GridAttention(nn.Module):
    """Multi-head attention with relative positions, (B, H, W, C) to the same shape.

    Parameters
    ----------
    official : Module
        `segment_anything`'s `Attention`; its Linears and tables are taken over under their names.
    how : str
        ``auto`` or a key of `ATTENTIONS`.

    Notes
    -----
    Called without a window it takes what upstream's module takes: the whole grid, or windows cut already. A module that
    stands in its place and says ``takes_grid = True`` is called as this one is, with the grid and the window.
    """

    takes_grid = True

    def __init__(self, official: Any, how: str = "auto") -> None:
        super().__init__()
        self.num_heads: int = official.num_heads
        self.scale: float = official.scale
        self.how = how
        self.rel_pos_h, self.rel_pos_w = official.rel_pos_h, official.rel_pos_w
        self.qkv, self.proj = official.qkv, official.proj

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        return self.proj(self.attend(self.qkv(x), window, self.fill(x) if window else None))

    def fill(self, x: Tensor) -> Tensor:
        """What a padding token projects to, shape (3 C,): upstream pads windows with zeros *before* `qkv`."""
        return self.qkv(x.new_zeros(1, 1, 1, x.shape[-1])).flatten()

    def attend(self, qkv: Tensor, window: int = 0, fill: Tensor | None = None) -> Tensor:
        """Heads of a grid, joined but not projected.

        Parameters
        ----------
        qkv : Tensor, shape (B, H, W, 3 C)
            All queries, all keys, all values, as SAM lays them out.
        window : int
            Side of the windows that tokens see each other in; 0 is the whole grid.
        fill : Tensor, shape (3 C,), optional
            Of tokens that windows reach over the grid's edge; needed where they do.

        Returns
        -------
        Tensor, shape (B, H, W, C)
        """
        batch, *grid, _ = qkv.shape
        tiles = partition(qkv, window, fill) if window else qkv
        n, h, w, _ = tiles.shape
        q, k, v = tiles.view(n, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.heads_of(
            q, k, v, Positions(relative_positions(self.rel_pos_h, h), relative_positions(self.rel_pos_w, w))
        )
        tiles = out.transpose(1, 2).reshape(n, h, w, -1)
        return joined(tiles, window, (batch, *grid)) if window else tiles

    def heads_of(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, more: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The heads of windows or whole grids: where an adaptation adds to them.

        Parameters
        ----------
        q, k, v, positions
            See `attention_chunks.chunked`.
        more : tuple of Tensor, shape (heads, p, d), optional
            Further keys and values under the same softmax, without a place on the grid (`attention.augmented`).

        Returns
        -------
        Tensor, shape (n, heads, N, d)
        """
        grid = positions.rows.shape[0], positions.columns.shape[0]
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
        how = self.how if more is None else "augmented"
        chosen = choose(how, attention.runs_on(q), q.shape[-1], grid, q.itemsize == 2, capability)
        if chosen.name == "augmented":
            return attention.augmented(q, k, v, positions, chosen.qk_width, chosen.v_width, more)
        return (attention.biased if chosen.name == "biased" else chunked)(q, k, v, positions)


class GridBlock(nn.Module):
    """A transformer block of windowed or global attention and a perceptron, (B, H, W, C) to the same shape.

    Parameters
    ----------
    official : Module
        `segment_anything`'s `Block`; its parts are taken over under their names.
    how : str
        See `GridAttention`.
    """

    def __init__(self, official: Any, how: str = "auto") -> None:
        super().__init__()
        self.norm1 = official.norm1
        self.attn: nn.Module = GridAttention(official.attn, how)
        self.norm2 = official.norm2
        self.mlp = official.mlp
        self.window_size: int = official.window_size

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(x)
        return x + self.mlp(self.norm2(x))

    def attended(self, x: Tensor) -> Tensor:
        """What attention adds to x, (B, H, W, C): where an adaptation adds a branch."""
        x = self.norm1(x)
        if getattr(self.attn, "takes_grid", False):
            return self.attn(x, self.window_size)
        # An adaptation's module, written for upstream's block: it is given windows that were cut before.
        if not self.window_size:
            return self.attn(x)
        return joined(self.attn(partition(x, self.window_size)), self.window_size, x.shape[:3])


class GridEncoder(ImageEncoderViT):
    """SAM's image encoder, (B, 3, h, w) normalised pixels to (B, D, h/P, w/P); h and w up to the trained size.

    Parameters
    ----------
    official : ImageEncoderViT
        Its parts are taken over under their names, so that state dicts are those of upstream.
    how : str
        ``auto`` or a key of `ATTENTIONS`; with ``reference`` the blocks stay upstream's.

    Attributes
    ----------
    checkpointing : bool
        Keep nothing of a block for the backward pass but its input, and run it once more there.
    """

    def __init__(self, official: ImageEncoderViT, how: str = "auto") -> None:
        nn.Module.__init__(self)  # upstream's constructor would draw and allocate weights
        self.img_size = official.img_size
        self.patch_embed = official.patch_embed
        self.pos_embed = official.pos_embed
        self.blocks = (
            official.blocks if how == "reference" else nn.ModuleList(GridBlock(b, how) for b in official.blocks)
        )
        self.neck = official.neck
        self.attention = how
        self.checkpointing = False

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        if self.pos_embed is not None:
            x = x + self.pos_embed[:, : x.shape[1], : x.shape[2]]
        for block in self.blocks:
            x = run_block(block, x, self.checkpointing)
        return self.neck(x.permute(0, 3, 1, 2))


def run_block(block: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """A block's output; with `checkpointing` nothing but `x` is kept, where there will be a backward pass at all."""
    call = call_of_blocks()
    if not (checkpointing and torch.is_grad_enabled()):
        return call(block, x)
    # The state of the generator is kept, so that dropout in an adaptation draws the same twice.
    return checkpoint(call, block, x, use_reentrant=False)


def partition(x: Tensor, window: int, fill: Tensor | None = None) -> Tensor:
    """Cut a grid into windows, row by row.

    Parameters
    ----------
    x : Tensor, shape (B, H, W, C)
    window : int
    fill : Tensor, shape (C,), optional
        Value of cells beyond the bottom and right edge, where windows do not tile the grid; zeros by default.

    Returns
    -------
    Tensor, shape (B * windows, window, window, C)
    """
    batch, h, w, width = x.shape
    below, beside = -h % window, -w % window
    if below or beside:
        if fill is None:
            x = functional.pad(x, (0, 0, 0, beside, 0, below))
        else:
            fill = fill.to(x.dtype)
            x = torch.cat([x, fill.expand(batch, h, beside, width)], dim=2)
            x = torch.cat([x, fill.expand(batch, below, w + beside, width)], dim=1)
    down, across = (h + below) // window, (w + beside) // window
    return x.view(batch, down, window, across, window, width).transpose(2, 3).reshape(-1, window, window, width)


def joined(tiles: Tensor, window: int, shape: tuple[int, ...]) -> Tensor:
    """The way back of `partition`: windows to a grid of `shape` (B, H, W), without the cells beyond its edges."""
    batch, h, w = shape[:3]
    down, across = -(-h // window), -(-w // window)
    x = tiles.view(batch, down, across, window, window, -1).transpose(2, 3)
    # A linear layer would lay its weights out once for every row of a grid that is not laid out itself.
    return x.reshape(batch, down * window, across * window, -1)[:, :h, :w].contiguous()
