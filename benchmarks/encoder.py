"""The image encoder alone, forward: ours and the official way, in one process, interleaved.

    python benchmarks/encoder.py [--model vit_b] [--images 1] [--rounds 3] [--amp none] [--out encoder.csv]

Random weights; one image of 700 x 1024 px. *official* is segment_anything's own code on 1024 x 1024; *exact* is ours on
the same input, with the largest difference between both outputs; *unpadded* is ours on 704 x 1024, another function.
CPU: CPU seconds; CUDA, taken where there is one: wall clock between synchronisations, and on it *biased* too. Printed
are seconds, medians of per-round ratios, and the rate of a matrix product in the same process; written are the seconds.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import ARCHITECTURES, build
from medsam_lora.models.vit import GridEncoder

sys.path.insert(0, str(Path(__file__).parent))
from train_step import ceiling


def main() -> None:
    """Run the rounds, write the CSV, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b", choices=[n for n in ARCHITECTURES if n != "vit_t"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"])
    parser.add_argument("--out", type=Path, default=Path("encoder.csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    official = build(options.model, "random", options.image_size, attention="reference").image_encoder.to(device)
    size = int(official.img_size)  # type: ignore[arg-type]
    exact = GridEncoder(copy.deepcopy(official))  # type: ignore[arg-type]
    pixels = torch.randn(options.images, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    pixels[:, :, size * 700 // 1024 :] = 0
    rows = -(-size * 700 // 1024 // 16) * 16
    variants: dict[str, tuple[Any, Tensor]] = {
        "official": (official, pixels),
        "exact": (exact, pixels),
        "unpadded": (exact, pixels[:, :, :rows]),
    }
    if device.type == "cuda":
        variants["biased"] = (GridEncoder(copy.deepcopy(official), "biased"), pixels)  # type: ignore[arg-type]
    found: list[dict[str, Any]] = []
    outputs: dict[str, Tensor] = {}
    for r in range(options.rounds + 1):  # the first is not counted
        for name, (encoder, image) in variants.items():
            started = time.process_time() if device.type == "cpu" else time.perf_counter()
            with torch.inference_mode(), autocast(device, options.amp):
                outputs[name] = encoder(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.process_time() if device.type == "cpu" else time.perf_counter()
            if r:
                found.append({"round": r, "variant": name, "seconds": now - started})
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["round", "variant", "seconds"])
        writer.writeheader()
        writer.writerows(found)
    rate = ceiling(device, torch.float32 if options.amp == "none" else torch.bfloat16)
    print(f"{options.model}, {options.images} image(s), {options.amp}, {device.type}; GEMM {rate:.0f} GFLOP/s")
    print("| variant | s | official / this | largest difference, of the largest value |\n|---|---:|---:|---:|")
    times = {name: [row["seconds"] for row in found if row["variant"] == name] for name in variants}
    for name in variants:
        ratio = median(a / b for a, b in zip(times["official"], times[name], strict=True))
        same = outputs[name].shape == outputs["official"].shape
        error = (outputs[name] - outputs["official"]).abs().max() / outputs["official"].abs().max() if same else None
        shown = "" if error is None else f"{float(error):.1e}"
        print(f"| {name} | {median(times[name]):.3g} | {ratio:.2f} | {shown} |")


if __name__ == "__main__":
    main()
