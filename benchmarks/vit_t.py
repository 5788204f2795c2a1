"""Where MobileSAM's encoder spends its time on the CPU, and what our way of computing it gains.

    OMP_NUM_THREADS=1 python benchmarks/vit_t.py [--image-size 1024] [--rounds 3] [--csv FILE] [--figure FILE.png]

A slice of four modalities (700 x 1024 px in the frame, random weights: cost does not depend on them), forward without
gradients. *plain* computes the same function as the published description invites to: a convolution and then its
BatchNorm, images as NCHW, attention by `scaled_dot_product_attention` with the bias as mask, memory returned to the
system as glibc does by default. *ours* is the package's encoder with freed memory kept; *unpadded* is ours on the
704 rows that the slice covers, another function. Each variant is a fresh process that runs the slice twice and reports
the second; rounds alternate. Parts of a variant are timed by hooks on its modules, in CPU seconds; *rest* is copies
between them. The sums of squares of the outputs
of *plain* and *ours* are compared.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsam_lora.models import tiny_vit
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.sam import SamModel, build

VARIANTS = ("plain", "ours", "unpadded")
MODALITIES = 4
PARTS = ("stem", "inverted bottlenecks", "merging", "attention", "local convolution", "perceptron", "neck", "rest")


def main() -> None:
    """Run the rounds, print a Markdown table; or, as a child, measure one variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.child, options.image_size)))
        return
    rows = []
    for number in range(options.rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--child", variant, "--image-size", str(options.image_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"round": number, "variant": variant, **json.loads(done.stdout)})
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    table = {v: {key: middle(rows, v, key) for key in rows[0] if key not in ("round", "variant")} for v in VARIANTS}
    print(
        f"`vit_t` at {options.image_size} px, {MODALITIES} images, {options.rounds} rounds, "
        f"{torch.get_num_threads()} thread(s)"
    )
    print("| CPU s | " + " | ".join(VARIANTS) + " |\n|---|" + "---:|" * len(VARIANTS))
    for key in ("encoder_s", "wall_s", *PARTS, "decoder_s", "peak_mib"):
        print(f"| {key} | " + " | ".join(f"{table[v][key]:.3g}" for v in VARIANTS) + " |")
    by_round = [
        {v: next(r for r in rows if (r["round"], r["variant"]) == (n, v)) for v in VARIANTS}
        for n in range(options.rounds)
    ]
    for key in ("encoder_s", "wall_s"):
        ratios = [median(one["plain"][key] / one[v][key] for one in by_round) for v in VARIANTS]
        print(f"| plain / this, {key} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    checks = {row["variant"]: row["check"] for row in rows}
    apart = abs(checks["plain"] - checks["ours"]) / abs(checks["plain"])
    print(f"outputs: plain and ours differ by {apart:.1e} of their sum of squares")
    if options.figure:
        draw(table, options.figure)


def middle(rows: list[dict[str, Any]], variant: str, key: str) -> float:
    """Median over the rounds."""
    return float(median(row[key] for row in rows if row["variant"] == variant))


def measured(variant: str, size: int) -> dict[str, float]:
    """Seconds and peak of this process."""
    if variant == "plain":
        as_described()
    else:
        keep_freed_memory()
    sam = build("vit_t", "random", size, seed=0, grid="unpadded")
    height = -(-size * 700 // 1024 // 16) * 16 if variant == "unpadded" else size
    pixels = torch.randn(MODALITIES, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels[:, :, size * 700 // 1024 :] = 0
    pixels = pixels[:, :, :height].contiguous()
    seconds = clocked(sam)
    boxes = torch.tensor([[0.2, 0.2, 0.5, 0.5]] * MODALITIES) * size
    with torch.inference_mode():
        for _ in range(2):
            seconds.clear()
            wall, started = time.perf_counter(), time.process_time()
            embedding = sam.encode(pixels)
            encoder, wall = time.process_time() - started, time.perf_counter() - wall
            started = time.process_time()
            sam.decode(embedding, boxes)
            decoder = time.process_time() - started
    parts = {name: seconds[name] for name in PARTS[:-1]}
    return {
        "encoder_s": encoder,
        "wall_s": wall,
        "decoder_s": decoder,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **parts,
        "rest": encoder - sum(parts.values()),
        "check": float(embedding.double().square().sum()),
    }


def clocked(sam: SamModel) -> dict[str, float]:
    """Hooks that add up the CPU seconds of each kind of module; the dict fills as the encoder runs."""
    encoder = sam.image_encoder
    kinds: list[tuple[nn.Module, str]] = [(encoder.patch_embed, "stem"), (encoder.neck, "neck")]  # type: ignore[list-item]
    for module in encoder.modules():
        if isinstance(module, tiny_vit.TinyViTBlock):
            kinds += [(module.attn, "attention"), (module.local_conv, "local convolution"), (module.mlp, "perceptron")]
        elif isinstance(module, tiny_vit.MBConv):
            kinds.append((module, "inverted bottlenecks"))
        elif isinstance(module, tiny_vit.PatchMerging):
            kinds.append((module, "merging"))
    seconds: dict[str, float] = defaultdict(float)
    for module, kind in kinds:
        begun: list[float] = []
        module.register_forward_pre_hook(lambda *_, begun=begun: begun.append(time.process_time()))
        module.register_forward_hook(lambda *_, begun=begun, kind=kind: _add(seconds, kind, begun.pop()))
    return seconds


def _add(seconds: dict[str, float], kind: str, begun: float) -> None:
    seconds[kind] += time.process_time() - begun


def as_described() -> None:
    """Let the encoder's modules compute step by step what their descriptions say."""

    def convolution_then_norm(self: tiny_vit.ConvNorm, x: Tensor) -> Tensor:
        return self.bn(self.c(x))

    def attention(self: tiny_vit.Attention, x: Tensor) -> Tensor:
        q, k, v, bias = self.attention_parts(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape))

    stage = tiny_vit.TinyViT.forward

    def images_first(self: tiny_vit.TinyViT, pixels: Tensor) -> Tensor:
        kept = torch.channels_last
        torch.channels_last = torch.contiguous_format  # type: ignore[misc]
        try:
            return stage(self, pixels)
        finally:
            torch.channels_last = kept  # type: ignore[misc]

    tiny_vit.ConvNorm.forward = convolution_then_norm  # type: ignore[method-assign]
    tiny_vit.Attention.forward = attention  # type: ignore[method-assign]
    tiny_vit.TinyViT.forward = images_first  # type: ignore[method-assign]


def draw(table: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of the parts, one on another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(VARIANTS, 0.0)
    for part in (*PARTS, "decoder_s"):
        widths = [table[v][part] for v in VARIANTS]
        axes.barh(VARIANTS, widths, left=[left[v] for v in VARIANTS], label=part.removesuffix("_s"))
        left = {v: left[v] + w for v, w in zip(VARIANTS, widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds of a slice of four modalities")
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
