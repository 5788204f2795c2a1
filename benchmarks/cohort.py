"""Drawing the synthetic cohort in one process and in several, with and without their own share of the cores.

    python benchmarks/cohort.py [--cases 20] [--rounds 2] [--csv FILE]

Alternating, each in a fresh folder; seconds of wall clock, start of the processes included, medians.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from medsam_lora.datasets.phantom import make_cohort
from medsam_lora.processes import cores

COLUMNS = ("processes", "openblas_threads", "seconds")


def seconds(cases: int, workers: int, threads: int | None) -> float:
    """Of one cohort; `threads` of OpenBLAS in each worker, None for what the package gives them."""
    kept = os.environ.pop("OPENBLAS_NUM_THREADS", None)
    if threads is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            make_cohort(Path(folder) / "cohort", cases, 0, workers=workers)
            return time.perf_counter() - started
    finally:
        os.environ.pop("OPENBLAS_NUM_THREADS", None)
        if kept is not None:
            os.environ["OPENBLAS_NUM_THREADS"] = kept


def main() -> None:
    """Measure, print a Markdown table, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    several = max(2, cores())
    ways = {
        (1, "as loaded"): (1, None),
        (several, "all cores"): (several, cores()),
        (several, "a share"): (several, None),
    }
    taken: dict[tuple[int, str], list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, (workers, threads) in ways.items():
            taken[way].append(seconds(options.cases, workers, threads))
    rows = [(*way, round(median(times), 1)) for way, times in taken.items()]
    print("| processes | OpenBLAS threads of each | s |\n|---:|---|---:|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
