r"""What predicting a slice costs: this package against the loop that SAM's own predictor invites to.

    OMP_NUM_THREADS=1 python benchmarks/predict.py [--model vit_t] [--weights official] [--image-size 1024] \
        [--slices 2] [--rounds 3] [--device auto] [--csv FILE] [--figure docs/images/predict_speed.png]

All variants take the same prepared slices of four modalities and the same boxes to fused masks on the crop grid,
alternating round by round in one process, the first round dropped; ratios are medians of the per-round ratios.

- official: `SamPredictor` image by image, as its notebook has it: `set_image` on an 8-bit RGB image (resized by PIL to
  the long side, normalised, padded), `predict` with a box, one image at a time; logits averaged over the modalities.
  Written out from segment_anything 1.0, on its own `Sam` with its own image encoder, because `SamPredictor` itself
  cannot be imported without torchvision. `vit_t` has no official encoder here: its official loop runs ours
  (benchmarks/vit_t.py compares encoders).
- ours: `predict_slices`, a batch of slices with all their modalities; also in bf16, on the unpadded grid (another
  function at the border, as `model.grid` says) and, on CUDA, in TF32.
- ours, second prompt: other boxes for the same case, from the embeddings of the first (`embed_case`).

Seconds are of wall clock on CUDA, else CPU seconds. Peak memory is that of fresh processes. The share of the encoder is
what `ours` spends in the image encoder alone: the floor that no better loop around it gets below.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.geometry import Geometry
from medsam_lora.inference.predictor import PredictOptions, embed_case, predict_slices
from medsam_lora.labels import MODALITIES
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import build_segmenter, choose_device
from medsam_lora.models.input_spec import INPUT_RANGES, PIXEL_MEAN, PIXEL_STD
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.records import PreparedSlices
from medsam_lora.sam_modules import Sam
from medsam_lora.transforms.intensity import zscore

SHAPE = (146, 202)
COLUMNS = ("variant", "value", "unit", "ratio_to_ours")

Boxes = dict[int, np.ndarray]


def phantom(n_slices: int) -> tuple[PreparedSlices, Boxes, Boxes]:
    """Slices of an ellipse of noise with a bright disc, the box around it, and another box."""
    generator = np.random.default_rng(0)
    x, y = SHAPE
    rows, columns = np.mgrid[:x, :y]
    brain = ((rows - x / 2) / (0.47 * x)) ** 2 + ((columns - y / 2) / (0.47 * y)) ** 2 < 1
    image = np.zeros((n_slices, 4, x, y), np.int16)
    boxes, others = {}, {}
    for k in range(n_slices):
        i, j, radius = 60 + 3 * k, 90 - 4 * k, 18
        disc = (rows - i) ** 2 + (columns - j) ** 2 < radius**2
        image[k] = np.where(brain, np.maximum(generator.normal(300, 40, (4, x, y)) + 350 * disc, 1), 0)
        boxes[k] = np.array([[i - radius, j - radius, i + radius + 1, j + radius + 1]], np.float32)
        others[k] = boxes[k] + np.array([4, -3, 9, 5], np.float32)
    inside = image[:, :, brain].astype(np.float64)
    grid = Geometry((x, y, n_slices), np.eye(4))
    case = PreparedSlices(
        "phantom",
        "phantom",
        "test",
        MODALITIES,
        image,
        None,
        tuple(range(n_slices)),
        inside.mean(axis=2),
        inside.std(axis=2),
        "nonzero",
        grid,
        grid,
        {},
    )
    return case, boxes, others


def official_sam(options: argparse.Namespace) -> Sam:
    """Upstream's `Sam` with upstream's modules and the weights of ours."""
    sam = build(options, attention="auto" if options.model == "vit_t" else "reference").sam
    return Sam(
        sam.image_encoder, sam.prompt_encoder, sam.mask_decoder, pixel_mean=list(PIXEL_MEAN), pixel_std=list(PIXEL_STD)
    ).to(sam.pixel_mean.device)


def official(sam: Sam, case: PreparedSlices, boxes: Boxes) -> np.ndarray:
    """Slice by slice and modality by modality, as segment_anything/predictor.py does it."""
    size, window, device = sam.image_encoder.img_size, INPUT_RANGES["window"], sam.device
    scale = size / max(SHAPE)
    side = [int(n * scale + 0.5) for n in SHAPE]
    masks = np.zeros((len(case.ks), *SHAPE), bool)
    for n, k in enumerate(case.ks):
        logits = []
        for m in range(4):
            z = zscore(case.image[n, m : m + 1], case.mean[n, m : m + 1], case.std[n, m : m + 1], case.voxels)[0]
            grey = np.clip((z - window.low) / (window.high - window.low), 0, 1) * 255
            rgb = np.repeat(np.where(z == 0, 0, np.rint(grey)).astype(np.uint8)[..., None], 3, axis=2)
            resized = np.array(Image.fromarray(rgb).resize((side[1], side[0]), Image.Resampling.BILINEAR))
            with torch.no_grad():
                pixels = torch.as_tensor(resized, device=device).permute(2, 0, 1).contiguous()[None]
                features = sam.image_encoder(sam.preprocess(pixels))
                i0, j0, i1, j1 = boxes[k][0] * scale
                box = torch.as_tensor([[j0, i0, j1, i1]], dtype=torch.float, device=device)
                sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
                low, _ = sam.mask_decoder(
                    image_embeddings=features,
                    image_pe=sam.prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=False,
                )
                logits.append(sam.postprocess_masks(low, tuple(side), SHAPE)[0, 0])
        masks[n] = (torch.stack(logits).mean(dim=0) > 0).cpu().numpy()
    return masks


def build(options: argparse.Namespace, **settings: str) -> Segmenter:
    """The base model, nothing trained."""
    model = {"name": options.model, "weights": options.weights, "image_size": options.image_size, **settings}
    return build_segmenter(
        ModelConfig.model_validate(model),
        MethodConfig(name="zero_shot"),
        FusionConfig(),
        MODALITIES,
        ["WT"],
        0,
        choose_device(options.device),
    )


def variants(segmenter: Segmenter, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is compared, by name."""
    n_slices = options.slices
    case, boxes, others = phantom(n_slices)
    sam = official_sam(options)
    unpadded = build(options, grid="unpadded")
    found = embed_case(segmenter, case, PredictOptions(batch_size=n_slices))
    work: dict[str, Callable[[], Any]] = {
        "ours": lambda: predict_slices(segmenter, case, boxes, PredictOptions()),
        "official": lambda: official(sam, case, boxes),
        "ours, bf16": lambda: predict_slices(segmenter, case, boxes, PredictOptions(amp="bf16")),
        "ours, unpadded": lambda: predict_slices(unpadded, case, boxes, PredictOptions()),
        "ours, unpadded, bf16": lambda: predict_slices(unpadded, case, boxes, PredictOptions(amp="bf16")),
        "ours, second prompt": lambda: predict_slices(segmenter, case, others, PredictOptions(), found),
        "encoder alone": lambda: embed_case(segmenter, case, PredictOptions()),
    }
    if segmenter.device.type == "cuda":
        work["ours, tf32"] = lambda: predict_slices(segmenter, case, boxes, PredictOptions(amp="tf32"))
    return work


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of wall clock with everything on the GPU done, or of the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_mib(name: str) -> float:
    """Peak memory of a fresh process that does one variant once."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name: str, options: argparse.Namespace) -> None:
    """Do one variant and print the peak of this process, or of its GPU, in MiB."""
    case, boxes, _ = phantom(options.slices)
    if name == "official":
        official(official_sam(options), case, boxes)
    else:
        segmenter = build(options, grid="unpadded" if "unpadded" in name else "padded")
        predict_slices(segmenter, case, boxes, PredictOptions(amp="bf16" if "bf16" in name else "none"))
    if choose_device(options.device).type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def draw(path: Path, rows: dict[str, tuple[float, float]], title: str) -> None:
    """The figure: seconds per slice by variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 2.4), layout="constrained")
    bars = axes.barh(list(rows), [row[0] for row in rows.values()], height=0.6)
    for bar, name in zip(bars, rows, strict=True):
        bar.set_color("#2a6f97" if name.startswith("ours") else "#c9c9c9")
    axes.bar_label(bars, [f"{s:.2f} s ({r:.2f} x ours)" for s, r in rows.values()], padding=3, fontsize=8)
    axes.set_xlim(0, 1.4 * max(row[0] for row in rows.values()))
    axes.set_xlabel("seconds per slice of four modalities", fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Compare, measure, print, and write what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--weights", default="random", help="official, random, or a file.")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--slices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-memory", action="store_true", help="Leave the peaks of fresh processes out.")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # the official loop gains by it too
    if options.child:
        child(options.child, options)
        return
    segmenter = build(options)
    title = f"{options.model} at {options.image_size} px, {segmenter.device}"
    print(f"{title}; load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    work = variants(segmenter, options)
    taken: dict[str, list[float]] = {name: [] for name in work}
    results: dict[str, Any] = {}
    for index in range(options.rounds + 1):
        for name, run in work.items():
            if index:
                taken[name].append(seconds(run, segmenter.device) / options.slices)
            else:
                results[name] = run()
    ours, theirs = results["ours"][:, 0], results["official"]
    overlap = 2 * (ours & theirs).sum() / max((ours.sum() + theirs.sum()), 1)
    print(f"masks of ours and official: Dice {overlap:.4f} (8-bit images and PIL's antialiasing account for the rest)")
    rows = {
        name: (median(own), median(a / b for a, b in zip(own, taken["ours"], strict=True)))
        for name, own in taken.items()
    }
    table: list[tuple[Any, ...]] = []
    for name, (value, ratio) in rows.items():
        print(f"  {name:<20}{value:8.3f} s per slice  {ratio:5.2f} x ours")
        table.append((name, value, "s per slice", ratio))
    for name in () if options.no_memory else ("ours", "ours, bf16", "ours, unpadded, bf16", "official"):
        mib = peak_mib(name)
        print(f"  peak memory, {name}: {mib:.0f} MiB")
        table.append((name, mib, "MiB", ""))
    print(f"load after: {os.getloadavg()[0]:.1f}")
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            csv.writer(handle, lineterminator="\n").writerows([COLUMNS, *table])
    if options.figure:
        draw(options.figure, rows, title)


if __name__ == "__main__":
    main()
