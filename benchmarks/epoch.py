r"""An epoch of training beside the floor that arithmetic sets: the products of its steps at the GEMM rate found here.

    OMP_NUM_THREADS=1 python benchmarks/epoch.py [--model vit_b] [--image-size 1024] [--slices 4] [--batch-size 1] \
        [--method lora] [--grid padded] [--amp auto] [--epochs 3] [--device auto] [--csv FILE]

A synthetic cohort, one slice of four modalities from each case; the stage `train` as users run it (reading, prompts,
loss, metrics, optimiser), the first epoch dropped. The floor is what `models.footprint` counts of a step's forward and
backward pass, divided by the rate of a matrix product of the MLP's shape in this process and precision. The last column
scales to `--cases` slices an epoch, 680 by default, which the thesis trained on. Random weights: they take the time of
trained ones. On a GPU: ``--slices 64 --batch-size 4 --amp bf16``, for each ``--grid``.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from train_step import ceiling

from medsam_lora.config import build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import choose_device
from medsam_lora.models.footprint import StepOptions, dry
from medsam_lora.models.precision import resolve_amp
from medsam_lora.models.sam import build
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train
from medsam_lora.training.loop import Trainer
from medsam_lora.transforms.resizing import covered_frame

MODALITIES = 4
CROP = 138, 202
"""Of the thesis: a model frame of 1024 px shows it at 700 x 1024."""


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--slices", type=int, default=4, help="Of an epoch; a case each.")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--grid", default="padded")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cases", type=int, default=680)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of the run."""
    return {
        "slicing": {"name": "max_slice"},
        "crop": {"size": list(CROP), "allow_tumour_loss": True},
        "model": {
            "name": options.model,
            "weights": "random",
            "image_size": options.image_size,
            "grid": options.grid,
        },
        "method": {"name": options.method},
        "train": {
            "epochs": options.epochs + 1,
            "batch_size": options.batch_size,
            "amp": options.amp,
            "select": "last",
            "validate_every": options.epochs + 1,
        },
    }


def epochs(options: argparse.Namespace) -> list[float]:
    """Seconds of wall clock of every epoch's updates, the first one included."""
    taken: list[float] = []
    whole = Trainer._run_epoch

    def clocked(self: Trainer, *args: Any) -> Any:
        started = time.perf_counter()
        found = whole(self, *args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
        return found

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_cohort(folder / "cohort", options.slices, 0, (144, 208, 24))
        build_manifest(folder / "cohort", folder / "manifest.csv", {"train": 1.0, "val": 0.0, "test": 0.0}, 0)
        config = build_config(settings(options))
        store, outcome = prepare(folder / "manifest.csv", folder / "cohort", folder / "prepared", config)
        assert not outcome.failed
        Trainer._run_epoch = clocked  # type: ignore[method-assign]
        train(folder / "manifest.csv", store, folder / "run", config, device=options.device)
    return taken


def floor(options: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """TFLOP of an epoch's steps, and the GFLOP/s that a product reaches here."""
    amp = resolve_amp(options.amp, device)
    size = build(options.model, "random", options.image_size).image_size
    frame = covered_frame(CROP, size) if options.grid == "unpadded" else (size, size)
    method = build_config(settings(options)).method
    found = dry(StepOptions(options.model, method, frame, MODALITIES, options.image_size, amp, "chunked"))
    each = (found.forward_flops + found.backward_flops) / 1e12
    return each * options.slices, ceiling(device, torch.bfloat16 if amp == "bf16" else torch.float32)


def main() -> None:
    """Measure, print a Markdown table, and write the CSV."""
    options = parsed()
    keep_freed_memory()
    device = choose_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    taken = epochs(options)[1:]
    tflop, rate = floor(options, device)
    seconds, least = median(taken), 1000 * tflop / rate
    row = {
        "model": options.model,
        "image_size": options.image_size,
        "method": options.method,
        "grid": options.grid,
        "amp": resolve_amp(options.amp, device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "slices": options.slices,
        "epoch_s": round(seconds, 3),
        "tflop": round(tflop, 3),
        "gemm_gflop_per_s": round(rate, 1),
        "floor_s": round(least, 3),
        "times_floor": round(seconds / least, 2),
        f"hours_{options.cases}": round(seconds / options.slices * options.cases / 3600, 3),
    }
    print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
