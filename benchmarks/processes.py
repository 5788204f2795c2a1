r"""Updates of a training in one process that takes the whole machine, and in several that share every batch.

    python benchmarks/processes.py [--model vit_t] [--image-size 256] [--processes 2] [--slices 16] [--batch-size 4] \
        [--rounds 3] [--amp none] [--device auto] [--csv FILE]

A synthetic cohort; the stage `train` with LoRA on it, in fresh alternating runs, with ``train.processes`` of 1 and of
`--processes`. Seconds an update are those of the epochs behind the first, in wall clock; medians over the rounds. The
losses of both are compared: the updates are the same but for rounding. Random weights: they take the time of trained
ones.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from statistics import median

from medsam_lora.config import build_config
from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.io.tables import read_table
from medsam_lora.stages.manifest import build_manifest
from medsam_lora.stages.prepare import prepare
from medsam_lora.stages.train import train

COLUMNS = ("model", "image_size", "amp", "batch_size", "round", "processes", "seconds_per_update", "loss")
EPOCHS = 3
SLICING = {"slicing": {"name": "max_slice"}}


def measured(manifest: Path, store: Path, run: Path, options: argparse.Namespace, processes: int) -> dict[str, float]:
    """Train once; seconds of an update behind the first epoch, and the last loss."""
    settings = {
        **SLICING,
        "model": {"name": options.model, "weights": "random", "image_size": options.image_size},
        "train": {
            "epochs": EPOCHS,
            "batch_size": options.batch_size,
            "amp": options.amp,
            "validate_every": EPOCHS,
            "processes": processes,
        },
    }
    train(manifest, store, run, build_config(settings), device=options.device)
    rows = read_table(run / "log.csv", ("updates", "duration_s", "loss"))
    seconds = median(float(row["duration_s"]) / int(row["updates"]) for row in rows[1:])
    return {"seconds_per_update": seconds, "loss": float(rows[-1]["loss"])}


def main() -> None:
    """Run the rounds, print a Markdown table, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--slices", type=int, default=16, help="Of an epoch; a case each.")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--amp", default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    n_cases = options.slices + 2
    taken: dict[int, list[dict[str, float]]] = {1: [], options.processes: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_cohort(folder / "cohort", n_cases, 0, (96, 112, 24))
        shares = {"train": options.slices / n_cases, "val": 2 / n_cases, "test": 0.0}
        build_manifest(folder / "cohort", folder / "manifest.csv", shares, 0)
        store, _ = prepare(folder / "manifest.csv", folder / "cohort", folder / "prepared", build_config(SLICING))
        for number in range(options.rounds):
            for processes, found in taken.items():
                run = folder / f"run-{number}-{processes}"
                found.append(measured(folder / "manifest.csv", store, run, options, processes))
    alone, together = taken[1], taken[options.processes]
    ratio = median(a["seconds_per_update"] / b["seconds_per_update"] for a, b in zip(alone, together, strict=True))
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(alone, together, strict=True))
    print("| processes | s / update | one / this | losses apart |\n|---:|---:|---:|---:|")
    print(f"| 1 | {median(a['seconds_per_update'] for a in alone):.3f} | 1 | |")
    print(
        f"| {options.processes} | {median(b['seconds_per_update'] for b in together):.3f} | {ratio:.2f} | {apart:.1e} |"
    )
    if options.csv:
        settings = (options.model, options.image_size, options.amp, options.batch_size)
        with options.csv.open("w", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(COLUMNS)
            for processes, found in taken.items():
                writer.writerows(
                    (*settings, n, processes, f"{one['seconds_per_update']:.4f}", one["loss"])
                    for n, one in enumerate(found)
                )


if __name__ == "__main__":
    main()
