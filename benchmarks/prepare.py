r"""What preparing a case costs: this package against a dictionary pipeline of MONAI, from the files to stored slices.

    OMP_NUM_THREADS=1 python benchmarks/prepare.py [--real FOLDER] [--cases 4] [--rounds 3] [--csv FILE] \
        [--figure docs/images/prepare_speed.png]

Three tasks: the slice with the most tumour, normalised by its own statistics; the same by those of the volume; and
every slice, by those of the volume. Each case is done by all in one process and one thread, alternating, the first
round dropped; all crop to the same window and write what a training run reads. Times are CPU seconds per case
(median over cases and rounds), ratios the median of the ratios case by case.

- ours: `prepare`'s own steps for a case: read with every fault looked for, orient, choose, measure, crop, write
  int16 slices with their statistics and hashes. For slice statistics the files are hashed whole and inflated only up
  to the slice, as `prepare` does after `verify`.
- ours, unverified: the same without what `verify` notes, every file inflated and checked to its end.
- MONAI: LoadImaged, Orientationd, NormalizeIntensityd, CenterSpatialCropd, ConcatItemsd; writes float32 with np.save,
  uncompressed, neither checked nor hashed. In a process of its own, as one runs it.
- MONAI, memory kept: the same in the process of ours, where glibc is told to keep freed memory as `prepare` does.
- inflate: zlib-ng over the bytes that ours needs, into memory that is there: no reader can be faster.

What is stored is compared before anything is timed: raw voxels bit for bit with nibabel's, normalised ones with
numpy's in float64 and with MONAI's. Peak memory is that of fresh processes that prepare one case. Without `--real` the
cases are phantoms of 240 x 240 x 155 voxels.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from medsam_lora.io.inflate import GzipStream
from medsam_lora.io.partial import VERIFIED_FILE, read_verified
from medsam_lora.io.store import open_case
from medsam_lora.labels import MODALITIES
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.records import CaseRecord
from medsam_lora.stages.prepare import prepare_one
from medsam_lora.stages.prepare_jobs import Job
from medsam_lora.transforms.cropping import CropPlan
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.slicing import SlicingPlan
from medsam_lora.transforms.stages import PreparePlan

TASKS = {
    "max slice, slice statistics": ("max_slice", "slice", 10),
    "max slice, volume statistics": ("max_slice", "volume", 8),
    "full volume": ("full", "volume", 4),
}
"""Slicing, scope, and the ratio to MONAI that is aimed at."""

SIZE = (146, 202)
SHAPE = (240, 240, 155)
VARIANTS = ("ours", "ours, unverified", "MONAI", "MONAI, memory kept", "inflate")
COLUMNS = ("task", "variant", "value", "unit", "ratio_to_ours")

Pipeline = Callable[[dict[str, str]], dict[str, Any]]


def our_job(record: CaseRecord, root: Path, task: str, out: Path, verified: Path | None) -> Job:
    """What `prepare` makes of a case and a plan."""
    slicing, scope, _ = TASKS[task]
    plan = PreparePlan(
        slicing=SlicingPlan(slicing, tumour_only=slicing != "full"),
        # Where MONAI's pipeline cuts tumour off, so does ours: the windows are the same.
        crop=CropPlan(size=SIZE, allow_tumour_loss=True),
        scope=scope,
    )
    return Job(record, root, plan, out, 2**31, {} if verified is None else read_verified(verified))


def monai_pipeline(task: str) -> Pipeline:
    """The pipeline that MONAI's tutorials build, in its shortest form."""
    from monai.transforms import (
        CenterSpatialCropd,
        Compose,
        ConcatItemsd,
        EnsureChannelFirstd,
        Lambda,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
    )

    slicing, scope, _ = TASKS[task]
    keys = (*MODALITIES, "seg")

    def largest(data: dict[str, Any]) -> dict[str, Any]:
        k = int((data["seg"] > 0).sum(dim=(0, 1, 2)).argmax())
        return data | {key: data[key][..., k : k + 1] for key in ("image", "seg")}

    read = [
        LoadImaged(keys),
        EnsureChannelFirstd(keys),
        Orientationd(keys, "RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        ConcatItemsd(MODALITIES, "image"),
    ]
    normalise = NormalizeIntensityd("image", nonzero=True, channel_wise=True)
    choose = [] if slicing == "full" else [Lambda(largest)]
    rest = [normalise, *choose] if scope == "volume" else [*choose, normalise]
    return Compose([*read, *rest, CenterSpatialCropd(("image", "seg"), (*SIZE, -1))])


def by_monai(pipeline: Pipeline, record: CaseRecord, root: Path, out: Path) -> None:
    """One case through MONAI; image and label are written as float32 and uint8."""
    data = pipeline({key: str(root / file) for key, file in record.files.items()})
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "image.npy", np.asarray(data["image"]))
    np.save(out / "label.npy", np.asarray(data["seg"]).astype(np.uint8))


def monai_seconds(task: str, record: CaseRecord, root: Path, out: Path) -> float:
    """CPU seconds of one case, in the process that calls it."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    pipeline = _PIPELINES.setdefault(task, monai_pipeline(task))
    started = time.process_time()
    by_monai(pipeline, record, root, out)
    return time.process_time() - started


_PIPELINES: dict[str, Pipeline] = {}


def inflater(record: CaseRecord, root: Path, last_plane: int | None) -> Callable[[], None]:
    """Inflate the files of a case, the images up to a plane where one is given; reading included, headers known."""
    import nibabel as nib

    wanted = []
    for key, file in record.files.items():
        image = nib.load(root / file)
        depth = image.shape[2] if last_plane is None or key == "seg" else last_plane + 1
        wanted.append((root / file, 352 + int(np.prod(image.shape[:2])) * depth * image.get_data_dtype().itemsize))
    memory = np.zeros(max(size for _, size in wanted), np.uint8)

    def run() -> None:
        for path, size in wanted:
            GzipStream(path.read_bytes()).read_into(memory.data[:size])

    return run


def check(record: CaseRecord, root: Path, task: str, store: Path, theirs: Path) -> tuple[float, float]:
    """Raw voxels bit for bit with nibabel's; how far normalised ones are from float64's and from MONAI's."""
    import nibabel as nib

    stored = open_case(store / record.case_id, check_hash=True)
    scope = TASKS[task][1]
    monai = np.load(theirs / "image.npy")
    from_exact = from_monai = 0.0
    for m, key in enumerate(MODALITIES):
        volume = np.asarray(nib.as_closest_canonical(nib.load(root / record.files[key])).dataobj)
        x, y = ((n - size) // 2 for n, size in zip(volume.shape, SIZE, strict=False))
        for n, k in enumerate(stored.ks):
            native = volume[x : x + SIZE[0], y : y + SIZE[1], k]
            if not np.array_equal(native, stored.image[n, m]):
                raise SystemExit(f"{record.case_id}: slice {k} of {key} is not the file's")
            z = zscore(stored.image[n, m][None], stored.mean[n, m : m + 1], stored.std[n, m : m + 1], stored.voxels)[0]
            from_monai = max(from_monai, float(np.abs(monai[m, ..., n] - z).max()))
            if n % 10 == 0:
                seen = volume[..., k] if scope == "slice" else volume
                values = seen[seen != 0].astype(np.float64)
                mean, std = (values.mean(), values.std()) if values.size else (0.0, 1.0)
                exact = np.where(native != 0, (native - mean) / std, 0.0)
                from_exact = max(from_exact, float(np.abs(exact - z).max()))
    return from_exact, from_monai


def phantoms(folder: Path, count: int) -> None:
    """A small cohort of full size, with its manifest."""
    from medsam_lora.datasets.phantom import make_cohort

    make_cohort(folder, count, shape=SHAPE)


def measure(
    records: list[CaseRecord], root: Path, task: str, rounds: int, place: Path, apart: ProcessPoolExecutor
) -> dict[str, tuple]:
    """CPU seconds per case and the ratio to ours, of every variant; differences are printed."""
    pipeline, verified = monai_pipeline(task), root_table(root, place)
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    worst = [0.0, 0.0]
    for record in records:
        job = our_job(record, root, task, place / "ours", verified)
        whole = our_job(record, root, task, place / "whole", None)
        out = place / "monai" / record.case_id
        prepare_one(job)
        by_monai(pipeline, record, root, out)
        worst = [max(a, b) for a, b in zip(worst, check(record, root, task, place / "ours", out), strict=True)]
        chosen = job.read_chosen().planes
        work: dict[str, Callable[[], object]] = {
            "ours": lambda: prepare_one(job),  # noqa: B023
            "ours, unverified": lambda: prepare_one(whole),  # noqa: B023
            "MONAI": lambda: apart.submit(monai_seconds, task, record, root, out).result(),  # noqa: B023
            "MONAI, memory kept": lambda: by_monai(pipeline, record, root, out),  # noqa: B023
            "inflate": inflater(record, root, None if chosen is None else max(chosen)),
        }
        for index in range(rounds + 1):
            for name, run in work.items():
                started = time.process_time()
                told = run()
                if index:
                    own = told if isinstance(told, float) else time.process_time() - started
                    taken[name].append(own)
    print(f"{task}: raw voxels bit-equal; normalised within {worst[0]:.1e} of float64, {worst[1]:.1e} of MONAI's")
    return {
        name: (median(seconds), median(a / b for a, b in zip(seconds, taken["ours"], strict=True)))
        for name, seconds in taken.items()
    }


def root_table(root: Path, place: Path) -> Path:
    """What `verify` notes of the cases, made once."""
    from medsam_lora.stages.verify import verify

    table = place / VERIFIED_FILE
    if not table.is_file():
        verify(place / "manifest.csv", root, place / "findings.csv")
    return table


def peak_mib(*arguments: str) -> float:
    """Peak memory of a fresh process of this file, which prints it."""
    command = [sys.executable, __file__, "--child", *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def child(variant: str, task: str, root: Path, place: Path) -> None:
    """Prepare one case, or only import what that takes, and print the peak of this process in MiB."""
    from medsam_lora.io.manifest import read_manifest

    record = read_manifest(place / "manifest.csv")[0]
    if variant.startswith("MONAI"):
        pipeline = monai_pipeline(task)
        if variant == "MONAI":
            by_monai(pipeline, record, root, place / "child")
    elif variant == "ours":
        keep_freed_memory()
        prepare_one(our_job(record, root, task, place / "child", place / VERIFIED_FILE))
    # Not ru_maxrss, which starts at the size of the process that started this one.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def draw(path: Path, results: dict[str, dict[str, tuple]]) -> None:
    """The figure: seconds per case by task and variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(10, 2.4), sharey=True, layout="constrained")
    for axes, (task, rows) in zip(panels, results.items(), strict=True):
        bars = axes.barh(list(rows), [row[0] for row in rows.values()], height=0.6)
        for bar, name in zip(bars, rows, strict=True):
            bar.set_color("#2a6f97" if name.startswith("ours") else "#b23a48" if name == "inflate" else "#c9c9c9")
        labels = [f"{s:.3f} s" + ("" if n == "ours" else f" ({r:.1f} x)") for n, (s, r) in rows.items()]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_xlim(0, 1.45 * max(row[0] for row in rows.values()))
        axes.set_title(task, fontsize=9, loc="left")
        axes.set_xlabel("CPU seconds per case", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Check, measure, print, and write what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="Folder of BraTS cases with references.")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true", help="Leave the peaks of fresh processes out.")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        variant, task, root, place = options.child
        child(variant, task, Path(root), Path(place))
        return
    import torch

    from medsam_lora.io.manifest import read_manifest, write_manifest
    from medsam_lora.stages.manifest import build_manifest

    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    results: dict[str, dict[str, tuple]] = {}
    table: list[tuple] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        root = options.real
        if root is None:
            root = place / "phantoms"
            phantoms(root, options.cases)
        build_manifest(root, place / "manifest.csv", {"train": 1.0}, 0)
        records = read_manifest(place / "manifest.csv")[: options.cases]
        write_manifest(place / "manifest.csv", records)
        for task, (_, _, goal) in TASKS.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as apart:
                results[task] = measure(records, root, task, options.rounds, place, apart)
            for variant, (seconds, ratio) in results[task].items():
                print(f"  {variant:<18}{seconds:8.3f} s  {ratio:6.2f} x ours")
                table.append((task, variant, seconds, "s", ratio))
            share = 1 / results[task]["inflate"][1]
            print(f"  aim {goal} x MONAI; {100 / share:.0f} % of the speed of inflate alone")
            for variant in () if options.no_memory else ("MONAI, imports", "ours, imports", "MONAI", "ours"):
                mib = peak_mib(variant, task, str(root), str(place))
                print(f"  peak memory, {variant}: {mib:.0f} MiB")
                table.append((task, variant, mib, "MiB", ""))
    print(f"load after: {os.getloadavg()[0]:.1f}")
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([COLUMNS, *table])
    if options.figure:
        draw(options.figure, results)


if __name__ == "__main__":
    main()
