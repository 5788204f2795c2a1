"""What keeping freed memory in the process is worth on a CPU: a SAM encoder with and without it.

    python benchmarks/allocator.py [--model vit_t] [--weights random] [--image-size 512] [--rounds 3]

Each round runs one fresh process per variant, alternating; every process does a forward pass of four images (a slice
with its modalities) and a LoRA step twice and reports the second. Prints seconds of wall clock, user and system
time, and the median of the per-round ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

VARIANTS = ("fp32", "fp32, kept", "bf16", "bf16, kept")


def seconds(work: Callable[[], None]) -> dict[str, float]:
    """Wall clock, user and system seconds of the second of two calls."""
    work()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {"wall": wall, "user": after.ru_utime - before.ru_utime, "system": after.ru_stime - before.ru_stime}


def child(variant: str, options: argparse.Namespace) -> None:
    """Measure one variant in this process and print JSON."""
    import torch

    from medsam_lora.config import MethodConfig
    from medsam_lora.models.allocator import keep_freed_memory
    from medsam_lora.models.precision import autocast
    from medsam_lora.models.sam import build
    from medsam_lora.peft import attach

    if variant.endswith("kept"):
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    amp = variant[:4] if variant.startswith("bf16") else "none"
    model = build(options.model, options.weights, options.image_size)
    size = model.image_size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]] * 4) * size

    def forward() -> None:
        with torch.inference_mode(), autocast(pixels.device, amp):
            model(pixels, boxes)

    def step() -> None:
        with autocast(pixels.device, amp):
            logits, iou = model(pixels, boxes)
        (logits.float().mean() + iou.float().mean()).backward()

    measured = {"forward": seconds(forward)}
    attach(model, MethodConfig(name="lora"), 0)
    measured["LoRA step"] = seconds(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"measured": measured, "peak_mib": peak}))


def main() -> None:
    """Run the rounds and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child")
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
        return
    rounds: list[dict[str, dict]] = []
    for _ in range(options.rounds):
        results = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", variant]
            results[variant] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rounds.append(results)
    print(f"{options.model}, {options.image_size} px, 4 images, {options.threads} thread(s), {options.rounds} rounds")
    print("| variant | work | wall s | user s | system s | fp32 wall / this | peak MiB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for variant in VARIANTS:
        for work in ("forward", "LoRA step"):
            cells = [
                median(r[variant]["measured"][work][clock] for r in rounds) for clock in ("wall", "user", "system")
            ]
            ratio = median(r["fp32"]["measured"][work]["wall"] / r[variant]["measured"][work]["wall"] for r in rounds)
            peak = median(r[variant]["peak_mib"] for r in rounds)
            print(f"| {variant} | {work} | " + " | ".join(f"{c:.2f}" for c in cells) + f" | {ratio:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
