"""A LoRA step of a SAM model, ours and the official way: time, memory, and share of what the machine could do.

    python benchmarks/train_step.py [--model vit_b] [--images 1] [--variants ...] [--rounds 3] [--out train_step.csv]

An image of 700 x 1024 with one box goes through encoder and decoder to a scalar and back; weights are random (cost does
not depend on them). *official* is segment_anything's own encoder code with the same LoRA branches and decoder. Every
round runs one fresh process per variant, alternating; each does the step `--steps` times and reports the last, then
once more to count what it keeps for the backward pass. CPU: seconds of CPU time, as other work may run beside it, and
the peak of resident memory. CUDA (taken where there is one): seconds of wall clock between synchronisations over
`--steps` repetitions after as many to warm up, and the peak of allocated memory. ``--compile`` is
`train.compile`, blocks through torch.compile.
Rows are written as soon as they are measured; a variant that fails (out of memory, say) is named, and the others go on.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

_WARM_UP = 5
SHAPE = 138, 202  # a crop that the model frame of 1024 px shows at 700 x 1024

# Attention, grid, autocast, checkpointing, whether the encoder's qkv has LoRA.
VARIANTS: dict[str, tuple[str, str, str, bool, bool]] = {
    "official fp32": ("reference", "padded", "none", False, True),
    "official bf16": ("reference", "padded", "bf16", False, True),
    "official fp32, checkpointing": ("reference", "padded", "none", True, True),
    "exact fp32": ("auto", "padded", "none", False, True),
    "exact bf16": ("auto", "padded", "bf16", False, True),
    "exact fp32, checkpointing": ("auto", "padded", "none", True, True),
    "unpadded fp32": ("auto", "unpadded", "none", False, True),
    "unpadded fp32, frozen qkv": ("auto", "unpadded", "none", False, False),
    "unpadded fp32, checkpointing": ("auto", "unpadded", "none", True, True),
    "unpadded bf16": ("auto", "unpadded", "bf16", False, True),
    "unpadded bf16, checkpointing": ("auto", "unpadded", "bf16", True, True),
    "biased bf16": ("biased", "padded", "bf16", False, True),
}
DEFAULT = ["official fp32", "exact fp32", "unpadded fp32", "unpadded fp32, frozen qkv"]
COLUMNS = (
    "round",
    "model",
    "variant",
    "images",
    "device",
    "threads",
    "compiled",
    "seconds",
    "wall_s",
    "user_s",
    "system_s",
    "saved_mib",
    "peak_mib",
    "tflop",
    "gemm_gflop_per_s",
    "share_of_gemm",
)


def child(variant: str, options: argparse.Namespace) -> None:
    """Measure one variant in this process and print JSON."""
    import torch

    from medsam_lora.config import MethodConfig
    from medsam_lora.models.allocator import keep_freed_memory
    from medsam_lora.models.compiling import compiled_blocks
    from medsam_lora.models.footprint import MIB, SavedBytes, StepOptions, dry, total
    from medsam_lora.models.sam import build
    from medsam_lora.peft import attach
    from medsam_lora.transforms.resizing import covered_frame

    attention, grid, amp, checkpointing, lora = VARIANTS[variant]
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(options.model, "random", options.image_size, grid=grid, attention=attention).to(device)
    model.image_encoder.checkpointing = checkpointing
    method = MethodConfig(name="lora" if lora else "decoder_only", rank=options.rank)
    attach(model, method, 0)
    model.train()
    size = model.image_size
    frame = covered_frame(SHAPE, size) if grid == "unpadded" else (size, size)
    pixels = torch.randn(options.images, 3, *frame, generator=torch.Generator().manual_seed(0)).to(device)
    # With the qkv frozen the gradient still runs through every block, as it does where they are adapted.
    pixels.requires_grad_(not lora)
    boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]] * options.images, device=device) * size

    def step() -> None:
        model.zero_grad(set_to_none=True)
        pixels.grad = None
        total(model, pixels, boxes, amp).backward()

    result: dict[str, Any] = {"device": device.type, "compiled": options.compile}
    with compiled_blocks(options.compile):
        if device.type == "cuda":
            for _ in range(options.steps):
                step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            for _ in range(options.steps):
                step()
            torch.cuda.synchronize()
            result["seconds"] = (time.perf_counter() - started) / options.steps
            result["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
        else:
            for _ in range(options.steps):
                before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                step()
                result["wall_s"] = time.perf_counter() - started
                after = resource.getrusage(resource.RUSAGE_SELF)
            result |= {"user_s": after.ru_utime - before.ru_utime, "system_s": after.ru_stime - before.ru_stime}
            result["seconds"] = result["user_s"] + result["system_s"]
            result["peak_mib"] = after.ru_maxrss / 1024
    # In a pass of its own, as counting takes time; uncompiled, which keeps what is written in the modules.
    with SavedBytes(model) as saved:
        total(model, pixels, boxes, amp)
    result["saved_mib"] = saved.total / MIB
    # Of fused CUDA kernels torch counts no operations: there the products are those of the same step in pieces.
    if lora:
        way = "chunked" if device.type == "cuda" and attention == "auto" else attention
        found = dry(StepOptions(options.model, method, frame, options.images, options.image_size, amp, way))
        result["tflop"] = (found.forward_flops + found.backward_flops) / 1e12
    result["gemm_gflop_per_s"] = ceiling(device, torch.bfloat16 if amp == "bf16" else torch.float32)
    if "tflop" in result:
        result["share_of_gemm"] = 1000 * result["tflop"] / result["seconds"] / result["gemm_gflop_per_s"]
    print(json.dumps(result))


def ceiling(device: Any, dtype: Any) -> float:
    """GFLOP/s of a product of the MLP's shape, the median of up to fifty: what the machine gives at that moment."""
    import torch

    from medsam_lora.models.precision import resolve_amp

    a, b = (torch.randn(n, m, device=device, dtype=dtype) for n, m in ((2816, 768), (768, 3072)))
    if device.type == "cpu" and dtype == torch.bfloat16 and resolve_amp("auto", device) != "bf16":
        a = a[:256]  # emulated where the processor has no bfloat16
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken: list[float] = []
    # A processor that emulates a type takes seconds for a product.
    while len(taken) < _WARM_UP + 50 and (len(taken) < _WARM_UP + 3 or sum(taken) < 10):
        started = clock()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - started)
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / median(taken[_WARM_UP:]) / 1e9


def summary(rows: list[dict[str, Any]], variants: list[str]) -> str:
    """A Markdown table: medians, and medians of the per-round ratios to the first variant."""
    first = variants[0]
    lines = [
        f"| variant | s | {first} / this | saved MiB | share | peak MiB | TFLOP | of the GEMM rate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    by_round = {(row["round"], row["variant"]): row for row in rows}
    # The first variant may have failed; then there is nothing to compare with.
    variants = [v for v in variants if any(row["variant"] == v for row in rows)]
    if not variants:
        return "nothing was measured"
    lines[0] = lines[0].replace(first, variants[0])
    rounds = sorted({row["round"] for row in rows})
    for variant in variants:
        mine = [by_round[r, variant] for r in rounds if (r, variant) in by_round]
        pairs = [
            (by_round[r, variants[0]], by_round[r, variant])
            for r in rounds
            if (r, variant) in by_round and (r, variants[0]) in by_round
        ]
        if not pairs:
            continue
        speed = median(a["seconds"] / b["seconds"] for a, b in pairs)
        saved = median(b["saved_mib"] / a["saved_mib"] for a, b in pairs)
        flop, share = (mine[0].get(name) for name in ("tflop", "share_of_gemm"))
        cells = [f"{median(r['seconds'] for r in mine):.3g}", f"{speed:.2f}", f"{mine[0]['saved_mib']:.0f}"]
        cells += [f"{saved:.2f}", f"{median(r['peak_mib'] for r in mine):.0f}"]
        cells += ["" if flop is None else f"{flop:.2f}", "" if share is None else f"{share:.2f}"]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], variants: list[str], path: Path) -> None:
    """Bars of seconds and of saved memory, one for each variant."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 0.6 + 0.45 * len(variants)), sharey=True, layout="constrained")
    for axis, column, label in zip(axes, ("seconds", "saved_mib"), ("s / step", "saved activations, MiB"), strict=True):
        values = [[r[column] for r in rows if r["variant"] == v] for v in variants]
        axis.barh(variants, [median(v) if v else 0 for v in values], color="tab:blue")
        axis.set_xlabel(label)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the rounds, write the CSV, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--out", type=Path, default=Path("train_step.csv"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    rows: list[dict[str, Any]] = []
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for r in range(options.rounds):
            for variant in options.variants:
                command = [sys.executable, __file__, *sys.argv[1:], "--child", variant]
                done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    print(f"{variant}: failed ({done.returncode})", file=sys.stderr)
                    continue
                fixed = {"round": r, "model": options.model, "variant": variant, "images": options.images}
                rows.append(fixed | {"threads": options.threads} | json.loads(done.stdout.splitlines()[-1]))
                writer.writerow(rows[-1])
                file.flush()
    print(summary(rows, options.variants))
    if options.figure:
        draw(rows, options.variants, options.figure)


if __name__ == "__main__":
    main()
