"""Zero-shot Dice of each way to turn z-scores into pixels: the measurement behind docs/decisions/0001-input-range.md.

    python benchmarks/input_range.py CASES_DIR [--model vit_t] [--weights official] [--image-size 1024]

Per case: the slices at 25, 50 and 75 % of the tumour's extent and the one of the largest tumour area; whole tumour; the
exact reference box of every slice; the modalities fused by the mean of their logits; Dice pooled over the slices of a
case. Prints a Markdown table. Nothing is trained, and nothing is chosen by more than this one mean over cases.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medsam_lora.io.case import read_case
from medsam_lora.io.discovery import discover
from medsam_lora.labels import region_mask
from medsam_lora.metrics.overlap import Counts, count
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.input_spec import PIXEL_MEAN, PIXEL_STD, InputSpec
from medsam_lora.models.precision import autocast
from medsam_lora.models.sam import SamModel, build
from medsam_lora.progress import track
from medsam_lora.prompts.box import boxes_from_mask, to_model
from medsam_lora.records import CaseRecord, PreparedSlices
from medsam_lora.transforms.cropping import CropPlan, union_box
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.resizing import model_scale, to_model_frame, to_native_frame
from medsam_lora.transforms.stages import PreparePlan, case_brain_box, prepare_case

ToPixels = Callable[[Tensor], Tensor]


def percentiles(z: Tensor) -> Tensor:
    """Percentiles 0.5 to 99.5 of each image's foreground to 0..255."""
    pixels = []
    for image in z.flatten(0, 1):
        low, high = torch.quantile(image[image != 0], torch.tensor([0.005, 0.995])).tolist()
        pixels.append(InputSpec("window", low, high).to_pixels(image[None, None]))
    return torch.cat(pixels)


def normalised_twice(z: Tensor) -> Tensor:
    """Z-scores taken for 0..255 pixels, so that SAM's normalisation comes on top."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (z.flatten(0, 1).unsqueeze(1) - mean) / std


VARIANTS: dict[str, ToPixels] = {
    "window -1..3": InputSpec("window", -1, 3).to_pixels,
    "window -2..4": InputSpec("window", -2, 4).to_pixels,
    "window -3..3": InputSpec("window", -3, 3).to_pixels,
    "window -2.5..6": InputSpec("window", -2.5, 6).to_pixels,
    "percentiles 0.5-99.5 per image": percentiles,
    "minmax per image": InputSpec("minmax").to_pixels,
    "zscore as normalised pixels": InputSpec("zscore").to_pixels,
    "normalised twice": normalised_twice,
}


def chosen_slices(areas: np.ndarray) -> list[int]:
    """Indices along Z at 25, 50, 75 % of the slices that show tumour, and of the largest area."""
    shown = np.flatnonzero(areas)
    quarters = [int(shown[round(share * (len(shown) - 1))]) for share in (0.25, 0.5, 0.75)]
    return sorted({*quarters, int(areas.argmax())})


def read_cases(root: Path) -> Iterator[PreparedSlices]:
    """The cases under a folder, oriented, cropped to the brain box over all of them, the chosen slices only."""
    records: list[CaseRecord] = discover(root)
    box = union_box([case_brain_box(read_case(record, root)) for record in records], "all")
    plan = PreparePlan(crop=CropPlan(box=box))
    for record in records:
        case = read_case(record, root)
        if case.label_map is None:
            continue
        everything = prepare_case(case, plan, range(case.label_map.shape[2]))
        tumour = region_mask(everything.label, "WT")
        yield prepare_case(case, plan, chosen_slices(tumour.sum(axis=(1, 2))))


@torch.inference_mode()
def predicted(model: SamModel, z: np.ndarray, box: np.ndarray, to_pixels: ToPixels, amp: str) -> np.ndarray:
    """Mask (X, Y) of a z-scored slice (M, X, Y) with one box."""
    n_modalities, *shape = z.shape
    pixels = to_model_frame(to_pixels(torch.from_numpy(z)[None]), model.image_size)
    scale, _ = model_scale((shape[0], shape[1]), model.image_size)
    boxes = torch.from_numpy(to_model(np.repeat(box, n_modalities, axis=0), scale))
    with autocast(pixels.device, amp):
        logits, _ = model(pixels, boxes)
    native = to_native_frame(logits[:, :1].mean(dim=0, keepdim=True), model.image_size, (shape[0], shape[1]))
    return native[0, 0].numpy() > 0


def filled(shape: tuple[int, ...], box: np.ndarray) -> np.ndarray:
    """Mask of the box itself."""
    mask = np.zeros(shape, bool)
    i0, j0, i1, j1 = box[0].astype(int)
    mask[i0:i1, j0:j1] = True
    return mask


def pooled_dice(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Dice over all slices of a case."""
    counts: list[Counts] = [count(reference, prediction) for reference, prediction in pairs]
    tp, fp, fn = (sum(getattr(c, name) for c in counts) for name in ("tp", "fp", "fn"))
    return 2 * tp / (2 * tp + fp + fn)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--weights", default="official")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--amp", default="none", choices=["none", "bf16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model = build(options.model, options.weights, options.image_size)
    cases = list(read_cases(options.cases))
    scores: dict[str, list[float]] = {"box filled": [], **{name: [] for name in VARIANTS}}
    started = time.perf_counter()
    for case in track(cases, "cases"):
        references = [region_mask(label, "WT") for label in case.label]
        boxes = [boxes_from_mask(reference) for reference in references]
        floor = [(mask, filled(mask.shape, box)) for mask, box in zip(references, boxes, strict=True)]
        scores["box filled"].append(pooled_dice(floor))
        z = [zscore(case.image[n], case.mean[n], case.std[n], case.voxels) for n in range(len(case.ks))]
        for name, to_pixels in VARIANTS.items():
            masks = [predicted(model, *pair, to_pixels, options.amp) for pair in zip(z, boxes, strict=True)]
            scores[name].append(pooled_dice(list(zip(references, masks, strict=True))))
    print(f"| {options.model}, {model.image_size} px | " + " | ".join(case.case_id for case in cases) + " | mean |")
    print("|---|" + "---:|" * (len(cases) + 1))
    for name, values in scores.items():
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + f" | **{np.mean(values):.3f}** |")
    n_slices = sum(len(case.ks) for case in cases)
    print(
        f"\n{n_slices} slices of {len(cases)} cases, {time.perf_counter() - started:.0f} s, {options.threads} threads."
    )


if __name__ == "__main__":
    main()
