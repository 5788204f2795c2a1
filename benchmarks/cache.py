r"""What an epoch takes when what the frozen part of the encoder computes is kept on disk, and when it is not.

    OMP_NUM_THREADS=1 python benchmarks/cache.py [--model vit_t] [--image-size 512] [--slices 12] [--rounds 3] \
        [--device auto] [--amp none] [--batch-size 1] [--csv FILE]

A synthetic cohort; each method trains for three epochs in two fresh processes that alternate, with and without
``train.cache_gib``. The first epoch fills the cache; the table has the later ones, in wall clock and in CPU seconds of
the process, medians over the rounds, and what was kept. Losses of both are compared. Random weights: they take the time
of trained ones. `lora, last block` adapts the last block of the encoder alone, so that the blocks before it are kept.
On a GPU: ``--model vit_b --image-size 1024 --amp bf16 --batch-size 8 --slices 64``.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from medsam_lora.config import build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train
from medsam_lora.training.loop import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "decoder_only": {"name": "decoder_only"},
    "sam_parser": {"name": "sam_parser"},
    "lora, last block": {"name": "lora", "blocks": "last 1"},
}
EPOCHS = 3
SLICING = {"slicing": {"name": "max_slice"}}


def main() -> None:
    """Run the rounds and print a Markdown table; or, as a child, train one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--slices", type=int, default=12, help="Of an epoch; a case each.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="none")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(json.loads(options.child))))
        return
    n_cases = options.slices + 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_cohort(folder / "cohort", n_cases, 0, (96, 112, 24))
        build_manifest(
            folder / "cohort",
            folder / "manifest.csv",
            {"train": options.slices / n_cases, "val": 2 / n_cases, "test": 0.0},
            0,
        )
        store, _ = prepare(folder / "manifest.csv", folder / "cohort", folder / "prepared", build_config(SLICING))
        print(f"`{options.model}` at {options.image_size} px, {options.slices} slices of four modalities an epoch")
        every: list[dict[str, Any]] = []
        print("| method | kept | wall s | CPU s | not kept, wall s | CPU s | wall ratio | MiB | losses apart |")
        print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
        for name, method in METHODS.items():
            rows = []
            for number in range(options.rounds):
                pair = {}
                for kept in (4.0, 0.0):
                    settings = {
                        "manifest": str(folder / "manifest.csv"),
                        "store": str(store),
                        "device": options.device,
                        "run": str(folder / f"{name}-{number}-{kept}"),
                        "config": {
                            **SLICING,
                            "model": {"name": options.model, "weights": "random", "image_size": options.image_size},
                            "method": method,
                            "train": {
                                "epochs": EPOCHS,
                                "batch_size": options.batch_size,
                                "amp": options.amp,
                                "cache_gib": kept,
                                "validate_every": EPOCHS,
                            },
                        },
                    }
                    command = [sys.executable, __file__, "--child", json.dumps(settings)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    pair[kept] = json.loads(done.stdout.splitlines()[-1])
                rows.append((pair[4.0], pair[0.0]))
                every += [{"method": name, "round": number, "cache_gib": gib, **one} for gib, one in pair.items()]
            with_it, without = ({k: median(r[i][k] for r in rows) for k in ("wall", "cpu")} for i in (0, 1))
            ratio = median(no["wall"] / yes["wall"] for yes, no in rows)
            apart = max(abs(yes["loss"] - no["loss"]) for yes, no in rows)
            seconds = " | ".join(f"{one[k]:.2f}" for one in (with_it, without) for k in ("wall", "cpu"))
            kept_as = rows[0][0]
            print(
                f"| {name} | {kept_as['point']} | {seconds} | {ratio:.1f} | {kept_as['mib']:.0f} | {apart:.1e} |",
                flush=True,
            )
        if options.csv:
            with options.csv.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, list(every[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(every)


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process; seconds of an epoch's updates behind the first, and what was kept."""
    keep_freed_memory()
    epochs: list[tuple[float, float]] = []
    whole = Trainer._run_epoch

    def clocked(self: Trainer, *args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = whole(self, *args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        epochs.append((time.perf_counter() - wall, time.process_time() - cpu))
        return found

    Trainer._run_epoch = clocked  # type: ignore[method-assign]
    torch.set_num_threads(1)
    record = train(
        Path(settings["manifest"]),
        Path(settings["store"]),
        Path(settings["run"]),
        build_config(settings["config"]),
        device=settings["device"],
    )
    log = (Path(settings["run"]) / "log.csv").read_text().splitlines()
    loss = dict(zip(log[0].split(","), log[-1].split(","), strict=True))["loss"]
    kept = record["cache"]
    return {
        "wall": median(e[0] for e in epochs[1:]),
        "cpu": median(e[1] for e in epochs[1:]),
        "loss": float(loss),
        "point": kept["point"] if kept else "nothing",
        "mib": kept["gib"] * 1024 if kept else 0,
    }


if __name__ == "__main__":
    main()
