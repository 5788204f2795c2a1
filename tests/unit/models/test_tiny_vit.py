from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from medsam_lora.models.tiny_vit import (
    Attention,
    ConvNorm,
    FrozenBatchNorm2d,
    TinyViT,
    TinyViTBlock,
    offset_index,
)
from medsam_lora.peft.sites import attention_sites, mlp_sites


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor away from its start at 0 or 1, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.2, 3.0, generator=generator)
    return module


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_attention(attn: Attention, cells: Tensor, window: int) -> Tensor:
    """One window (window**2, C), head by head and pair by pair, with the rows of qkv taken per head."""
    width = cells.shape[1]
    head_dim = width // attn.num_heads
    normed = attn.norm(cells)
    joined = torch.zeros_like(cells)
    for head in range(attn.num_heads):
        first = 3 * head_dim * head
        rows = [slice(first + i * head_dim, first + (i + 1) * head_dim) for i in range(3)]
        q, k, v = (normed @ attn.qkv.weight[r].T + attn.qkv.bias[r] for r in rows)
        for a in range(window * window):
            scores = torch.empty(window * window)
            for b in range(window * window):
                down, across = abs(a // window - b // window), abs(a % window - b % window)
                bias = attn.attention_biases[head, down * window + across]
                scores[b] = q[a] @ k[b] / math.sqrt(head_dim) + bias
            joined[a, head * head_dim : (head + 1) * head_dim] = scores.softmax(0) @ v
    return joined @ attn.proj.weight.T + attn.proj.bias


def test_offsets_are_numbered_as_they_first_appear() -> None:
    # The rule of the published checkpoint: walk over all pairs of cells, number each new absolute offset.
    window = 5
    cells = [(r, c) for r in range(window) for c in range(window)]
    numbers: dict[tuple[int, int], int] = {}
    expected = [[numbers.setdefault((abs(a[0] - b[0]), abs(a[1] - b[1])), len(numbers)) for b in cells] for a in cells]
    assert offset_index(window).tolist() == expected


@torch.no_grad()
def test_attention_of_a_block_against_loops() -> None:
    # 5 x 4 cells in windows of 3: the grid is padded with zeros to 6 x 6, which the LayerNorm turns into its bias and
    # which count as keys.
    window, width = 3, 8
    block = TinyViTBlock(width, heads=2, window=window)
    randomised(block)
    x = noise(1, 5, 4, width)
    padded = torch.zeros(6, 6, width)
    padded[:5, :4] = x[0]
    expected = torch.zeros(6, 6, width)
    for i in (0, 3):
        for j in (0, 3):
            cells = padded[i : i + 3, j : j + 3].reshape(9, width)
            expected[i : i + 3, j : j + 3] = slow_attention(block.attn, cells, window).view(3, 3, width)
    torch.testing.assert_close(block.attended(x)[0], expected[:5, :4], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_block_is_attention_then_convolution_then_perceptron() -> None:
    block = TinyViTBlock(8, heads=2, window=2)
    randomised(block)
    x = noise(2, 4, 4, 8)
    after = x + block.attended(x)
    after = block.local_conv.bn(block.local_conv.c(after.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    hidden = nn.functional.gelu(block.mlp.norm(after) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    expected = after + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 4)])
def test_folded_normalisation_is_the_same_function(kernel: int, stride: int, groups: int) -> None:
    layer = ConvNorm(4, 8, kernel, stride, groups)
    randomised(layer)
    x = noise(2, 4, 7, 6).requires_grad_()
    wanted = [x, *layer.parameters()]
    folded = layer(x)
    plain = layer.bn(layer.c(x))
    torch.testing.assert_close(folded, plain, rtol=1e-5, atol=1e-5)
    weight = noise(*plain.shape, seed=5)
    grads = torch.autograd.grad((folded * weight).sum(), wanted)
    for ours, theirs in zip(grads, torch.autograd.grad((plain * weight).sum(), wanted), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_wrapped_convolution_is_called() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = ConvNorm(3, 3)
    x = noise(1, 3, 4, 4)
    before = layer(x)
    wrapped = Doubled(3, 3, 1, bias=False)
    wrapped.weight = layer.c.weight
    layer.c = wrapped
    # Mean 0, variance 1, weight 1, bias 0: doubling before the normalisation doubles after it.
    torch.testing.assert_close(layer(x), 2 * before)


def test_batch_norm_never_leaves_evaluation() -> None:
    encoder = TinyViT(32)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    with torch.no_grad():
        evaluated = encoder.eval()(noise(2, 3, 32, 32))
        trained = encoder.train()(noise(2, 3, 32, 32))
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2 + 2 * 3 + 3 * 3 + 10  # patch embedding, MBConv, mergings, local convolutions
    for norm in norms:
        norm.train()
        assert isinstance(norm, FrozenBatchNorm2d)
        assert not norm.training
        norm(noise(2, norm.num_features, 3, 3) + 7)
    assert encoder.training
    assert torch.equal(trained, evaluated)
    assert all(torch.equal(before[name], buffer) for name, buffer in encoder.named_buffers())


def test_gradients_reach_every_tensor() -> None:
    encoder = TinyViT(64).train()
    pixels = noise(1, 3, 64, 64).requires_grad_()
    (encoder(pixels) * noise(1, 256, 4, 4, seed=2)).sum().backward()
    assert pixels.grad is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_sites_name_linears_and_rows_per_head() -> None:
    encoder = TinyViT(32)
    sites = attention_sites(encoder)
    assert [site.qkv for site in sites][:3] == [
        "layers.1.blocks.0.attn.qkv",
        "layers.1.blocks.1.attn.qkv",
        "layers.2.blocks.0.attn.qkv",
    ]
    assert [(site.block, site.dim_in, site.heads) for site in sites] == [
        *((i, 128, 4) for i in (0, 1)),
        *((i, 160, 5) for i in range(2, 8)),
        *((i, 320, 10) for i in (8, 9)),
    ]
    for site in sites:
        qkv, proj = encoder.get_submodule(site.qkv), encoder.get_submodule(site.proj)
        assert (qkv.out_features, proj.in_features) == (3 * site.dim_in, site.dim_in)
        assert site.q[1] == range(96, 128)  # head 1 begins after the 3 x 32 rows of head 0
        assert sorted(site.rows("q") + site.rows("k") + site.rows("v")) == list(range(qkv.out_features))
    for site in mlp_sites(encoder):
        assert encoder.get_submodule(site.fc1).out_features == encoder.get_submodule(site.fc2).in_features


def test_rows_of_a_site_are_what_the_forward_takes() -> None:
    # Zeroing the value rows of a site leaves nothing of the attention but the bias of the projection.
    block = TinyViTBlock(160, heads=5, window=7)
    encoder = TinyViT(32)
    site = attention_sites(encoder)[2]
    with torch.no_grad():
        for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
            tensor[site.rows("v")] = 0
        out = block.attn(noise(2, 49, 160))
    torch.testing.assert_close(out, block.attn.proj.bias.expand(2, 49, 160))
