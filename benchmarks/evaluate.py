r"""What scoring a case costs: this package against MONAI and scipy used plainly, on 240 x 240 x 155 voxels.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py [--rounds 3] [--real FOLDER] [--csv FILE] \
        [--figure docs/images/evaluate_speed.png]

Every variant scores WT, TC and ET in one process and one thread, alternating round by round; the first round is
dropped. Seconds are CPU seconds (median), ratios the median of the per-round ratios to ours.

- ours: every column of a row with a challenge (overlap, surfaces, lesions), from two label maps to three rows.
- MONAI: Dice, HD95, NSD at 1 and 2 mm and ASSD of its metric functions, from ready masks (border voxels instead of
  surface area, no lesion-wise scores).
- scipy: the definitions of BraTS from ready masks, nothing cropped: distance transforms, labelling, dilation.

The pair `one tumour` is one rough ball of three labels and a prediction shifted and roughened; `many lesions` is
that and eleven small ones, some missed, and false positives over the whole volume. With `--real`, the references of a
folder of BraTS cases (``*seg.nii.gz``) are scored against roughened copies with false positives; nothing but seconds
is kept of them. Peak memory is that of fresh processes that score one case from its files. For the workers, the
`evaluate` stage scores a folder of cases with one process and with two, alternating, in seconds of wall clock.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
from scipy import ndimage

from medsam_lora import labels
from medsam_lora.geometry import Geometry
from medsam_lora.metrics.lesionwise import CHALLENGES
from medsam_lora.metrics.per_case import region_scores
from medsam_lora.stages.scoring import compare

SHAPE = (240, 240, 155)
GRID = Geometry(SHAPE, np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
MEANINGS = {label: frozenset({label}) for label in labels.LABELS.values()}
GOAL_S = 0.6
COLUMNS = ("part", "case", "challenge", "variant", "value", "unit", "ratio_to_ours")

Pair = tuple[np.ndarray, np.ndarray]


def one_tumour(seed: int = 0) -> Pair:
    """Reference and prediction: about 66 000, 17 000 and 15 000 voxels of WT, TC and ET."""
    axes = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in SHAPE], indexing="ij", sparse=True)
    maps = []
    rng = np.random.default_rng(seed)
    coarse = [rng.normal(size=(24, 24, 16)) for _ in range(2)]
    rough = [ndimage.zoom(noise, np.divide(SHAPE, noise.shape), order=1) for noise in coarse]
    rough[1] = rough[0] + rough[1] / 2
    for shift, noise in zip((0, 2), rough, strict=True):
        radius = np.sqrt(sum((axis - at) ** 2 for axis, at in zip(axes, (90 + shift, 120, 80), strict=True)))
        label_map = np.zeros(SHAPE, np.uint8)
        label_map[radius + 3 * noise < 24.5] = labels.SNFH
        label_map[radius + 2 * noise < 15.5] = labels.ET
        label_map[radius + noise < 7] = labels.NETC
        maps.append(label_map)
    return maps[0], maps[1]


def many_lesions(seed: int = 0) -> Pair:
    """The tumour of `one_tumour` and eleven balls, every fourth of them missed, and nine false positives."""
    reference, prediction = one_tumour(seed)
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij", sparse=True)
    for number in range(20):
        at, radius = [rng.integers(20, n - 20) for n in SHAPE], rng.uniform(2, 7)
        for which, label_map in enumerate((reference, prediction)):
            ball = sum((axis - a - which) ** 2 for axis, a in zip(axes, at, strict=True)) < (radius + which) ** 2
            if (number >= 11) if which == 0 else (number < 11 and number % 4 == 0):
                continue
            label_map[ball] = labels.SNFH if number % 3 else labels.ET
    return reference, prediction


def real_pairs(folder: Path) -> Iterator[tuple[str, Pair, Geometry]]:
    """Real references and what a prediction might be: moved here and there by some voxels, and four cubes in vain."""
    from medsam_lora.io.nifti import read_label_map

    for number, path in enumerate(sorted(folder.rglob("*seg.nii.gz")), start=1):
        volume = read_label_map(path)
        convention = "brats2018" if (volume.array == 4).any() else "brats2023"
        reference = labels.to_canonical(volume.array, convention)
        rng = np.random.default_rng(number)
        places = []
        for axis, n in enumerate(reference.shape):
            coarse = rng.normal(size=[m // 12 + 1 for m in reference.shape])
            moved = np.rint(1.5 * ndimage.zoom(coarse, np.divide(reference.shape, coarse.shape), order=1)).astype(int)
            places.append(np.clip(np.arange(n).reshape([-1 if a == axis else 1 for a in range(3)]) + moved, 0, n - 1))
        prediction = reference[tuple(places)]
        for _ in range(4):
            at, size = [rng.integers(20, n - 20) for n in reference.shape], rng.integers(1, 6)
            prediction[tuple(slice(a, a + size) for a in at)] = rng.integers(1, 4)
        yield f"real case {number}", (reference, prediction), volume.geometry


def ours(pair: Pair, challenge: str, grid: Geometry = GRID) -> dict[str, dict[str, float]]:
    """What `evaluate` does between reading the label maps of a case and writing its rows."""
    pairs = compare(*pair, MEANINGS, list(labels.REGIONS), grid)
    return {region: region_scores(comparison, challenge) for region, comparison in pairs.items()}


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """CPU seconds of every variant and the ratio to the first one, medians, alternating."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, work in variants.items():
            started = time.process_time()
            work()
            if index:
                taken[name].append(time.process_time() - started)
    first = next(iter(taken.values()))
    return {
        name: (median(seconds), median(own / base for own, base in zip(seconds, first, strict=True)))
        for name, seconds in taken.items()
    }


def against_others(pair: Pair, challenge: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Ours, MONAI and scipy on one pair; prints how far their numbers agree."""
    import torch
    from plain_scores import monai_plain, scipy_plain

    torch.set_num_threads(1)
    masks = {r: (labels.region_mask(pair[0], r), labels.region_mask(pair[1], r)) for r in labels.REGIONS}
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(pair, challenge),
        "MONAI": lambda: monai_plain(masks),
        "scipy": lambda: scipy_plain(masks, CHALLENGES[challenge]),
    }
    mine = ours(pair, challenge)
    for name, theirs in (("MONAI", monai_plain(masks)), ("scipy", scipy_plain(masks, CHALLENGES[challenge]))):
        for region, row in theirs.items():
            shown = ", ".join(f"{key} {value:.4f} ({mine[region][key]:.4f})" for key, value in row.items())
            print(f"  {name:<6}{region:<4}{shown}")
    return measure(variants, rounds)


def write_cohort(folder: Path, pairs: list[Pair]) -> None:
    """A manifest, references and predictions as `evaluate` takes them."""
    from medsam_lora.io.nifti import write_label_map
    from medsam_lora.io.tables import MANIFEST_COLUMNS, write_table

    rows = []
    for number, (reference, prediction) in enumerate(pairs):
        case = f"case-{number:02}"
        write_label_map(folder / f"{case}-seg.nii.gz", reference, GRID)
        write_label_map(folder / "predictions" / f"{case}.nii.gz", prediction, GRID)
        row = {"case_id": case, "patient_id": case, "seg": f"{case}-seg.nii.gz", "label_convention": "brats2023"}
        rows.append(dict.fromkeys(MANIFEST_COLUMNS, "") | row)
    write_table(folder / "manifest.csv", MANIFEST_COLUMNS, rows)


def score_folder(folder: Path, challenge: str, workers: int = 1) -> None:
    """The `evaluate` stage on such a folder."""
    from medsam_lora.stages.evaluate import evaluate

    out = folder / "scores"
    evaluate(folder / "manifest.csv", None, folder / "predictions", out, challenge=challenge, workers=workers)


def peak_mib(*arguments: str) -> float:
    """Peak memory of a fresh process of this file, which prints it."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def throughput(folder: Path, challenge: str, n_cases: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Cases per second of wall clock with one and two processes, and the ratio to one."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, taken in rates.items():
            started = time.perf_counter()
            score_folder(folder, challenge, workers)
            taken.append(n_cases / (time.perf_counter() - started))
    return {
        f"{workers} process{'es' * (workers > 1)}": (
            median(taken),
            median(b / a for a, b in zip(rates[1], taken, strict=True)),
        )
        for workers, taken in rates.items()
    }


def draw(path: Path, compared: dict[str, tuple[float, float]], single: dict[str, float]) -> None:
    """The figure: seconds of the three variants, and of ours case by case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), width_ratios=(1, 1.25), layout="constrained")
    names = list(compared)
    bars = left.barh(names, [compared[name][0] for name in names], color=["#2a6f97", "#c9c9c9", "#c9c9c9"], height=0.6)
    texts = [
        f"{s:.2f} s" + (f"  ({ratio:.0f} x ours)" if name != "ours" else "") for name, (s, ratio) in compared.items()
    ]
    left.bar_label(bars, texts, padding=4, fontsize=8)
    left.set_xscale("log")
    left.set_xlim(0.03, 60 * max(seconds for seconds, _ in compared.values()))
    left.set_title("One tumour, three regions", fontsize=9, loc="left")
    cases = list(single)
    right.barh(cases, list(single.values()), color="#2a6f97", height=0.6)
    right.axvline(GOAL_S, color="#b23a48", linewidth=1)
    right.text(GOAL_S - 0.01, -0.35, f"{GOAL_S} s", color="#b23a48", fontsize=8, ha="right", va="center")
    right.set_xlim(0, GOAL_S * 1.05)
    right.set_title("Ours, case by case (slower of two challenges)", fontsize=9, loc="left")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.set_xlabel("CPU seconds of one core", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def child(options: argparse.Namespace) -> None:
    """Score a folder's case, or only import what that takes, and print the peak of this process in MiB."""
    import medsam_lora.stages.evaluate  # noqa: F401

    if options.child != "import":
        score_folder(Path(options.child), "brats2023-gli")
    # Not ru_maxrss, which starts at the size of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def main() -> None:
    """Measure, print, and write what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", type=Path, help="Folder of BraTS cases with references.")
    parser.add_argument("--workers-cases", type=int, default=12, help="Cases for the comparison of workers.")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    table: list[tuple] = []
    compared = against_others(one_tumour(), "brats2023-gli", options.rounds)
    for name, (seconds, ratio) in compared.items():
        print(f"one tumour, brats2023-gli: {name:<6}{seconds:8.3f} s  {ratio:6.1f} x ours")
        table.append(("speed", "one tumour", "brats2023-gli", name, seconds, "s", ratio))
    single: dict[str, float] = {}
    cases = [("one tumour", one_tumour(), GRID), ("many lesions", many_lesions(), GRID)]
    for name, pair, grid in [*cases, *(real_pairs(options.real) if options.real else ())]:
        for challenge in ("brats2023-gli", "brats2023-men"):
            ((seconds, _),) = measure({"ours": lambda: ours(pair, challenge, grid)}, options.rounds).values()  # noqa: B023
            single[name] = max(single.get(name, 0.0), seconds)
            if (name, challenge) != ("one tumour", "brats2023-gli"):
                table.append(("speed", name, challenge, "ours", seconds, "s", 1.0))
        print(f"{name}: {single[name]:.3f} s")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "one"
        write_cohort(folder, [one_tumour()])
        for name, argument in (("imports", "import"), ("one case from its files", str(folder))):
            mib = peak_mib("--child", argument)
            print(f"peak memory, {name}: {mib:.0f} MiB")
            table.append(("memory", name, "brats2023-gli", "ours", mib, "MiB", 1.0))
        folder = Path(place) / "many"
        write_cohort(folder, [one_tumour(seed) for seed in range(options.workers_cases)])
        for name, (rate, ratio) in throughput(folder, "brats2023-gli", options.workers_cases, options.rounds).items():
            print(f"{options.workers_cases} cases, {name}: {rate:.2f} cases/s, {ratio:.2f} x one")
            table.append(("workers", f"{options.workers_cases} cases", "brats2023-gli", name, rate, "cases/s", ratio))
    print(f"load after: {os.getloadavg()[0]:.1f}")
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerows([COLUMNS, *table])
    if options.figure:
        draw(options.figure, compared, single)


if __name__ == "__main__":
    main()
