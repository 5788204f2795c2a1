"""One block's attention, forward and backward: in pieces, and by one fused call.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [--rounds 3] [--csv FILE]

ViT-B's heads: a global block of 64 x 64 tokens, of 44 x 64 (unpadded), and 25 windows of 14 x 14; in float32 and in
bfloat16. CPU seconds, alternating, the first round dropped, medians.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.attention import augmented
from medsam_lora.models.attention_choice import choose
from medsam_lora.models.attention_chunks import chunked
from medsam_lora.models.positions import Positions

HEADS, WIDTH = 12, 64
GRIDS = {"global": (1, 64, 64), "global, unpadded": (1, 44, 64), "windows": (25, 14, 14)}


def fused(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """One call, with the widths that the kernel takes."""
    grid = positions.rows.shape[0], positions.columns.shape[0]
    chosen = choose("augmented", "cpu", q.shape[-1], grid, q.itemsize == 2)
    return augmented(q, k, v, positions, chosen.qk_width, chosen.v_width)


WAYS: dict[str, Callable[..., Tensor]] = {"chunked": chunked, "augmented": fused}
COLUMNS = ("block", "type", "way", "forward_s", "backward_s")


def seconds(way: Callable[..., Tensor], grid: tuple[int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    """Of one forward and of one backward pass."""
    n, h, w = grid
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, HEADS, h * w, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in "qkv")
    positions = Positions(*(0.1 * torch.randn(side, side, WIDTH, generator=generator) for side in (h, w)))
    started = time.process_time()
    out = way(q, k, v, positions)
    half = time.process_time()
    out.float().sum().backward()
    return half - started, time.process_time() - half


def main() -> None:
    """Measure, print a Markdown table, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print("| block | type | way | forward s | backward s |\n|---|---|---|---:|---:|")
    rows = []
    for block, grid in GRIDS.items():
        for dtype in (torch.float32, torch.bfloat16):
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
            for _ in range(options.rounds + 1):
                for name, way in WAYS.items():
                    taken[name].append(seconds(way, grid, dtype))
            for name, times in taken.items():
                found = [round(median(part), 3) for part in zip(*times[1:], strict=True)]
                rows.append((block, str(dtype).removeprefix("torch."), name, *found))
                print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
