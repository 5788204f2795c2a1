"""What the unpadded grid does to Dice and to seconds, with real weights and cases.

    python benchmarks/unpadded_dice.py CASES_DIR [--model vit_t] [--weights official] [--image-size 512] [--step 12]

Zero-shot, every `step`-th tumour slice of every case on the brain box over all cases, exact whole-tumour box,
modalities fused by mean logit; every slice on both grids, one after the other. Printed: the Dice of each case, pooled
over its slices, and the median CPU seconds of a slice with all its modalities, encoding and decoding. ViT-B with its
weights: `--model vit_b --image-size 1024`. How *trained* models compare is a matter of two runs (docs/performance.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.labels import MODALITIES, region_mask
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import PreparedSlices
from medsam_lora.transforms.intensity import zscore

sys.path.insert(0, str(Path(__file__).parent))
from region_tokens import read_slices

GRIDS = "padded", "unpadded"


@torch.inference_mode()
def mask_of(segmenter: Segmenter, case: PreparedSlices, n: int) -> tuple[np.ndarray, float]:
    """Whole-tumour mask (X, Y) of slice `n`, and CPU seconds."""
    assert case.label is not None
    z = torch.from_numpy(zscore(np.asarray(case.image[n]), case.mean[n], case.std[n], case.voxels))[None]
    box = boxes_from_mask(region_mask(np.asarray(case.label[n]), "WT"))
    started = time.process_time()
    output = segmenter(z, [box])
    return (output.logits[0, 0] > 0).numpy(), time.process_time() - started


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--weights", default="official")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--step", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    segmenters = {}
    for grid in GRIDS:
        model = ModelConfig(name=options.model, weights=options.weights, image_size=options.image_size, grid=grid)
        zero_shot = MethodConfig(name="zero_shot")
        segmenters[grid] = build_segmenter(
            model, zero_shot, FusionConfig(), MODALITIES, ["WT"], 0, torch.device("cpu")
        ).eval()
    seconds: dict[str, list[float]] = {grid: [] for grid in GRIDS}
    differences = []
    print("| case | slices | padded | unpadded | difference |\n|---|---:|---:|---:|---:|")
    for case in read_slices(options.cases, options.step):
        sums = {grid: np.zeros(2) for grid in GRIDS}
        for n in range(len(case.ks)):
            wanted = region_mask(np.asarray(case.label[n]), "WT")
            for grid, segmenter in segmenters.items():
                mask, taken = mask_of(segmenter, case, n)
                seconds[grid].append(taken)
                sums[grid] += 2 * np.count_nonzero(mask & wanted), np.count_nonzero(mask) + np.count_nonzero(wanted)
        dice = {grid: s[0] / s[1] for grid, s in sums.items()}
        differences.append(dice["unpadded"] - dice["padded"])
        cells = " | ".join(f"{dice[grid]:.4f}" for grid in GRIDS)
        print(f"| {case.case_id} | {len(case.ks)} | {cells} | {differences[-1]:+.4f} |", flush=True)
    shape = segmenters["unpadded"].frame(case.crop.shape[:2])
    print(
        f"\nmean difference {np.mean(differences):+.4f}, {sum(d > 0 for d in differences)} of {len(differences)} higher"
    )
    print(f"{options.model}, {options.image_size} px, unpadded {shape[0]} x {shape[1]}, {options.threads} thread(s)")
    ratios = [a / b for a, b in zip(seconds["padded"], seconds["unpadded"], strict=True)]
    means = ", ".join(f"{grid} {median(seconds[grid]):.2f} s" for grid in GRIDS)
    print(f"a slice of {len(MODALITIES)} modalities: {means}; padded / unpadded {median(ratios):.2f}")


if __name__ == "__main__":
    main()
