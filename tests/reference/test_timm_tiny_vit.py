"""Our TinyViT against timm's, an independent implementation, where timm is installed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from medsam_lora.models.sam import build

_RENAMED = (
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    # timm merges at the beginning of a stage, the published checkpoint at the end of the one before.
    (r"^layers\.(\d)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"\.c\.weight$", ".conv.weight"),
)


def timm_trunk(state: dict[str, torch.Tensor]) -> nn.Module:
    """The trunk of timm with our weights, of which every one must find its place."""
    try:
        from timm.models.tiny_vit import tiny_vit_5m_224
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises RuntimeError
        pytest.skip(f"timm cannot be imported: {error}")
    trunk: Any = tiny_vit_5m_224(num_classes=0, window_sizes=(7, 7, 14, 7)).eval()
    trunk.stages[3].downsample.conv2.conv.stride = (1, 1)  # MobileSAM's change
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    head = {name: tensor for name, tensor in trunk.state_dict().items() if name.startswith("head.")}
    trunk.load_state_dict({**renamed, **head})
    return trunk


@pytest.mark.parametrize("image_size", [224, 320])  # 14 x 14 cells, one window; 20 x 20, windows padded
def test_trunk_equals_timm(image_size: int) -> None:
    encoder = build("vit_t", "random", image_size, seed=1).image_encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    own = {name: t for name, t in encoder.state_dict().items() if not name.startswith("neck.")}
    pixels = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    trunk = timm_trunk(own)
    with torch.no_grad():
        theirs = trunk.stages(trunk.patch_embed(pixels))
        expected = encoder.neck(theirs)
        assert (encoder(pixels) - expected).abs().max() <= 1e-4 * expected.abs().max()
