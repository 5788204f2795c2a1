"""`vit_nano`: SAM's own classes at a size that two cores can train. For the demo and tests, not for patients."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import nn

from medsam_lora.sam_modules import ImageEncoderViT

IMAGE_SIZE: Final = 256

PATCH: Final = 8
"""Pixels per token (the official models: 16): with few tokens on an object its outline is coarse."""

PROMPT_DIM: Final = 128
"""Width of the embedding and of the mask decoder's transformer (SAM: 256)."""

DECODER_MLP: Final = 512
DECODER_HEADS: Final = 4
IOU_HIDDEN: Final = 128


def nano_encoder() -> ImageEncoderViT:
    """The encoder, (B, 3, 256, 256) to (B, 128, 32, 32): six blocks, every third with global attention.

    Windows of 8 tile the 32 x 32 grid, so both kinds of attention and both kinds of position table are there.
    """
    return ImageEncoderViT(
        img_size=IMAGE_SIZE,
        patch_size=PATCH,
        embed_dim=192,
        depth=6,
        num_heads=6,
        mlp_ratio=4,
        out_chans=PROMPT_DIM,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(2, 5),
    )


def scatter_positions(encoder: ImageEncoderViT, std: float = 0.02) -> None:
    """Fill the position tables, which upstream leaves at zero, from the global generator (fork it around the call).

    0.02 is the deviation ViT (Dosovitskiy et al., ICLR 2021) and ViTDet start from.
    """
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name == "pos_embed" or name.endswith((".rel_pos_h", ".rel_pos_w")):
                nn.init.trunc_normal_(parameter, std=std)
