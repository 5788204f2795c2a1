"""Windowed attention in pieces against torch's fused call, and compiled blocks against plain ones."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from medsam_lora.models import attention_windows
from medsam_lora.models.attention_windows import windowed
from medsam_lora.models.compiling import call_of_blocks, compiled_blocks, is_compile_failure
from medsam_lora.models.sam import build

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU"
)


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def case(n: int = 7, heads: int = 3, cells: int = 9, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as one tensor, laid out as a fused layer's output; a bias; weights of the output."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(n, cells, heads, 3 * width, generator=generator, dtype=torch.float64)
    bias = torch.randn(heads, cells, cells, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, heads, cells, width, generator=generator, dtype=torch.float64)
    return qkv, bias, weight


def results(how: object, dtype: torch.dtype, amp: bool = False) -> list[Tensor]:
    """Output, gradients of q, k, v and of the bias, in float64."""
    qkv, bias, weight = case()
    # A bias is a parameter: in float32 however the queries come.
    bias = bias.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    qkv = qkv.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = how(*qkv.transpose(1, 2).chunk(3, dim=-1), bias)  # type: ignore[operator]
    (out * weight.to(out.dtype)).sum().backward()
    assert qkv.grad is not None and bias.grad is not None
    return [t.detach().double() for t in (out, qkv.grad, bias.grad)]


@pytest.mark.parametrize("piece", [1, 3 * 81 * 4 * 2, 2**30], ids=["a window", "two windows", "all"])
def test_pieces_and_the_fused_call_agree(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_windows, "PIECE_BYTES", piece)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        for ours, theirs in zip(results(windowed, dtype), results(fused, torch.float64), strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_half_precision_rounds_little_more_than_products_and_softmax_under_autocast() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v

    exact = results(fused, torch.float64)
    for one, ours, theirs in zip(
        exact, results(windowed, torch.bfloat16, True), results(plain, torch.bfloat16, True), strict=True
    ):
        # There softmax and its gradient are in float32.
        assert (ours - one).norm() <= 1.6 * (theirs - one).norm()


def test_no_scores_are_kept_for_the_backward_pass() -> None:
    qkv, bias, _ = case()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        windowed(*qkv.requires_grad_().transpose(1, 2).chunk(3, dim=-1), bias)
    assert {tuple(t.shape) for t in kept} == {(7, 3, 9, 4), (3, 9, 9)}


def test_blocks_are_compiled_within_the_context_and_where_gradients_are_recorded() -> None:
    plain = call_of_blocks()
    with compiled_blocks(False):
        assert call_of_blocks() is plain
    run = attention_windows.run_pieces
    with compiled_blocks():
        assert call_of_blocks() is not plain and attention_windows.run_pieces is not run
        with torch.no_grad():
            assert call_of_blocks() is plain
    assert call_of_blocks() is plain and attention_windows.run_pieces is run


@needs_compiler
@pytest.mark.parametrize("name", ["vit_nano", "vit_t"])
def test_compiled_blocks_are_the_same_function(name: str) -> None:
    torch.compiler.reset()
    encoder = build(name, "random", 64).image_encoder
    # Two blocks alike and no more: what takes the time is compiling.
    if name == "vit_nano":
        encoder.blocks = encoder.blocks[:2]  # type: ignore[assignment,index]
    else:
        encoder = encoder.layers[3]  # type: ignore[index,assignment]
    shape = (1, 3, 64, 64) if name == "vit_nano" else (1, 4, 4, 320)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = []
    for wanted in (False, True):
        encoder.zero_grad(set_to_none=True)
        with compiled_blocks(wanted):
            out = encoder(x)
            # Not its square: behind a LayerNorm that is a constant.
            (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        found.append([out.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for plain, compiled in zip(*found, strict=True):
        assert (plain - compiled).norm() <= 1e-4 * plain.norm() + 1e-5


def test_a_missing_compiler_is_recognised(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Not monkeypatch: what it sets back it deletes from torch's configuration.
    without = inductor.patch({"cpp.cxx": (None, "/no/such/compiler")})
    with without, pytest.raises(RuntimeError) as failure:
        torch.compile(lambda x: (x + 0.123).relu() * 3)(torch.zeros(37, 11))
    assert is_compile_failure(failure.value)
    torch.compiler.reset()
