"""What each base model costs: parameters, time and memory of one slice of four modalities, side by side.

    python benchmarks/models.py [--models vit_nano vit_t ...] [--amp none bf16] [--rounds 1] [--csv FILE]

Random weights: they take the time and memory of trained ones. Each measurement is a fresh process that builds the
model at its native image size, predicts one image to warm up, then the four modalities of a slice with one box each.
`vit_l` and `vit_h` are given one modality at a time, as at prediction where memory is short. Models take turns, and so
do float32 and bfloat16. Seconds are wall clock and, as the machine may have other work, CPU seconds. On a CPU
without bfloat16 instructions torch emulates them; the table says which it was.
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

MODELS = ("vit_nano", "vit_t", "vit_b", "vit_l", "vit_h")
ONE_AT_A_TIME = ("vit_l", "vit_h")
MODALITIES = 4
COLUMNS = ("model", "image_size", "parameters", "amp", "at_once", "wall_s", "cpu_s", "peak_mib", "resting_mib")


def child(name: str, amp: str, threads: int) -> None:
    """Measure one model in this process and print JSON."""
    import torch

    from medsam_lora.models.allocator import keep_freed_memory
    from medsam_lora.models.precision import autocast
    from medsam_lora.models.sam import build

    keep_freed_memory()
    torch.set_num_threads(threads)
    model = build(name, "random")
    resting = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size, at_once = model.image_size, 1 if name in ONE_AT_A_TIME else MODALITIES
    pixels = torch.randn(MODALITIES, 3, size, size, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.2, 0.2, 0.6, 0.6]] * MODALITIES) * size

    def seconds(images: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode(), autocast(pixels.device, amp):
            for first in range(0, images, at_once):
                last = min(first + at_once, images)
                model(pixels[first:last], boxes[first:last])
        return time.perf_counter() - wall, time.process_time() - cpu

    seconds(1)
    wall_s, cpu_s = seconds(MODALITIES)
    found = {
        "image_size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "at_once": at_once,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "resting_mib": resting,
    }
    print(json.dumps(found))


def main() -> None:
    """Run the rounds, print a Markdown table, and write it as CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--amp", nargs="+", default=("none",), choices=("none", "bf16"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.threads)
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name in options.models:
            for amp in options.amp:
                command = [sys.executable, __file__, "--threads", str(options.threads), "--child", name, amp]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.setdefault((name, amp), []).append(json.loads(text))
    rows = [
        {"model": name, "amp": amp} | {key: median(one[key] for one in each) for key in each[0]}
        for (name, amp), each in found.items()
    ]
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(f"one slice of {MODALITIES} modalities, {options.threads} thread(s), {options.rounds} round(s)")
    print("| model | px | parameters | numbers | at once | wall s | CPU s | peak MiB |")
    print("|---|---:|---:|---|---:|---:|---:|---:|")
    for row in rows:
        numbers = "float32" if row["amp"] == "none" else row["amp"]
        print(
            f"| `{row['model']}` | {row['image_size']:.0f} | {row['parameters'] / 1e6:.1f} M | {numbers} "
            f"| {row['at_once']:.0f} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {row['peak_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
