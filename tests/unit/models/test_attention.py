"""The ways of computing attention against upstream's formula, written out; outputs and gradients, odd grids too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medsam_lora.models import attention_chunks
from medsam_lora.models.attention import augmented, biased
from medsam_lora.models.attention_choice import ATTENTIONS, choose
from medsam_lora.models.attention_chunks import chunked, pieces_of
from medsam_lora.models.positions import Positions, relative_positions

GRIDS = [(5, 7), (2, 6), (8, 8)]
WAYS = {"chunked": chunked, "augmented": augmented, "biased": biased}
HEAD = 16


def written_out(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Every score on its own: (q k) / sqrt(d) + q R_h[row of q, row of k] + q R_w[column of q, column of k]."""
    (h, _, d), w = positions.rows.shape, positions.columns.shape[0]
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    pairs = positions.rows[row[:, None], row] + positions.columns[column[:, None], column]
    scores = torch.einsum("nhqd,nhkd->nhqk", q, k) / d**0.5 + torch.einsum("nhqd,qkd->nhqk", q, pairs)
    return scores.softmax(-1) @ v


def arguments(grid: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, grid[0] * grid[1], HEAD)] * 3 + [(n, n, HEAD) for n in grid]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def run(way, args: list[Tensor]) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output and gradient of every argument."""
    out = way(*args[:3], Positions(*args[3:]))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, args, weight)]


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest error, each tensor in parts of its own largest value."""
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(found, exact, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("way", WAYS)
def test_float64_is_the_formula(way: str, grid: tuple[int, int]) -> None:
    args = arguments(grid, torch.float64)
    assert worst(run(WAYS[way], args), run(written_out, args)) < 1e-12


@pytest.mark.parametrize("rows", [16, 40, 10_000])
def test_pieces_of_any_size_give_the_same(rows: int) -> None:
    args = arguments((5, 7), torch.float64)
    with pieces_of(rows * 35 * 8):
        assert worst(run(chunked, args), run(written_out, args)) < 1e-12


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1.5), (torch.bfloat16, 1.1), (torch.float16, 1.1)])
@pytest.mark.parametrize("way", WAYS)
def test_rounding_is_no_worse_than_of_the_formula(way: str, dtype: torch.dtype, slack: float) -> None:
    if way == "biased" and dtype != torch.float32:
        pytest.skip("its mask is rounded to the type of the queries, as upstream's scores are")
    args = arguments((8, 8), dtype)
    exact = run(written_out, [a.detach().double().requires_grad_() for a in args])
    plain, ours = worst(run(written_out, args), exact), worst(run(WAYS[way], args), exact)
    assert plain > 0
    assert ours <= slack * plain


@pytest.mark.parametrize(("qk", "value"), [(0, 0), (64, 64), (96, 32), (24, 16)])
def test_zeros_at_the_end_of_heads_change_nothing(qk: int, value: int) -> None:
    args = arguments((5, 7), torch.float64)

    def padded(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        return augmented(q, k, v, positions, qk, value)

    assert worst(run(padded, args), run(written_out, args)) < 1e-12


@pytest.mark.parametrize("together", [1, 2**30])
def test_half_precision_goes_through_a_batch_in_parts(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images one after the other, or all at once: gradients of the tables are sums over them."""
    args = arguments((5, 7), torch.bfloat16)
    expected = run(chunked, args)
    monkeypatch.setattr(attention_chunks, "_FOLDED_BYTES", together)
    found = run(chunked, args)
    assert all(torch.equal(a, b) for a, b in zip(found[:4], expected[:4], strict=True))
    assert worst(found[4:], [e.double() for e in expected[4:]]) < 0.02


def test_chunked_keeps_its_arguments_alone() -> None:
    args = arguments((8, 8), torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked(*args[:3], Positions(*args[3:]))
    assert sorted(t.data_ptr() for t in kept) == sorted(a.data_ptr() for a in args)


def test_tables_that_are_frozen_get_no_gradient() -> None:
    args = [a.detach().requires_grad_(i < 3) for i, a in enumerate(arguments((5, 7), torch.float64))]
    chunked(*args[:3], Positions(*args[3:])).sum().backward()
    assert [a.grad is not None for a in args] == [True] * 3 + [False] * 2


def test_a_table_is_sliced_not_stretched() -> None:
    table = torch.arange(9.0)[:, None]  # L = 5: row i - j + 4
    assert relative_positions(table, 3)[..., 0].tolist() == [[4, 3, 2], [5, 4, 3], [6, 5, 4]]
    assert relative_positions(table, 5)[0, 4].item() == 0
    with pytest.raises(ValueError, match="for 5 cells do not reach over 6"):
        relative_positions(table, 6)


@pytest.mark.parametrize(
    ("device", "grid", "half", "capability", "expected"),
    [
        ("cpu", (64, 64), False, (0, 0), ("chunked", 0, 0)),
        ("cpu", (14, 14), True, (0, 0), ("chunked", 0, 0)),
        ("mps", (64, 64), False, (0, 0), ("chunked", 0, 0)),
        ("cuda", (14, 14), True, (8, 0), ("augmented", 96, 96)),
        ("cuda", (64, 64), True, (9, 0), ("augmented", 192, 128)),
        ("cuda", (44, 64), True, (9, 0), ("augmented", 192, 128)),
        ("cuda", (44, 64), True, (8, 9), ("augmented", 176, 64)),
        ("cuda", (64, 64), False, (9, 0), ("augmented", 192, 64)),
        ("cuda", (14, 14), False, (8, 0), ("augmented", 96, 64)),
        ("cuda", (96, 96), True, (9, 0), ("augmented", 256, 64)),
    ],
)
def test_what_auto_means(
    device: str, grid: tuple[int, int], half: bool, capability: tuple[int, int], expected: tuple[str, int, int]
) -> None:
    chosen = choose("auto", device, 64, grid, half, capability)
    assert (chosen.name, chosen.qk_width, chosen.v_width) == expected
    assert chosen.reason


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "reference"])
def test_a_way_asked_for_by_name_is_taken(name: str) -> None:
    assert choose(name, "cpu", 64, (8, 8), half=False).name == name


def test_the_fused_kernel_of_cpus_takes_one_width() -> None:
    """With shorter values it is not taken, and a matrix of scores is kept."""
    chosen = choose("augmented", "cpu", 16, (5, 7), half=False)
    assert chosen.qk_width == chosen.v_width == 32
    args = arguments((5, 7), torch.float32)
    largest = []
    for v_width in (HEAD, chosen.v_width):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            augmented(*args[:3], Positions(*args[3:]), chosen.qk_width, v_width)
        largest.append(any(t.shape[-2:] == (35, 35) for t in kept if t.ndim > 1))
    assert largest == [True, False]
