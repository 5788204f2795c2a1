"""Which of SAM's mask tokens begins nearest to which region: the measurement behind docs/decisions/0002-regions.md.

    python benchmarks/region_tokens.py CASES_DIR [--model vit_t] [--weights official] [--image-size 512] [--step 12]

Zero-shot, every `step`-th tumour slice of every case, exact whole-tumour box, modalities fused by mean logit.
Printed are the mean area of each token's mask, how often each of tokens 1 to 3 is the largest and the smallest, and the
Dice of every token with every region, pooled over all slices.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from medsam_lora.config import FusionConfig, MethodConfig, ModelConfig
from medsam_lora.io.case import read_case
from medsam_lora.io.discovery import discover
from medsam_lora.labels import MODALITIES, REGIONS, region_mask
from medsam_lora.models.allocator import keep_freed_memory
from medsam_lora.models.assemble import build_segmenter
from medsam_lora.models.segmenter import N_TOKENS, Segmenter
from medsam_lora.progress import track
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import PreparedSlices
from medsam_lora.transforms.cropping import CropPlan, union_box
from medsam_lora.transforms.intensity import zscore
from medsam_lora.transforms.stages import PreparePlan, case_brain_box, prepare_case


def read_slices(root: Path, step: int) -> list[PreparedSlices]:
    """Every `step`-th slice with tumour of every case, on the brain box over all cases."""
    records = [record for record in discover(root) if "seg" in record.files]
    cases = [read_case(record, root) for record in records]
    plan = PreparePlan(crop=CropPlan(box=union_box([case_brain_box(case) for case in cases], "all")))
    chosen = []
    for case in cases:
        whole = prepare_case(case, plan, range(case.geometry.shape[2]))
        assert whole.label is not None
        chosen.append(prepare_case(case, plan, np.flatnonzero(whole.label.any(axis=(1, 2)))[::step].tolist()))
    return chosen


@torch.inference_mode()
def token_masks(segmenter: Segmenter, case: PreparedSlices, n: int) -> np.ndarray:
    """Masks (4, X, Y) of slice `n` by every mask token."""
    assert case.label is not None
    z = zscore(np.asarray(case.image[n]), case.mean[n], case.std[n], case.voxels)
    box = boxes_from_mask(region_mask(np.asarray(case.label[n]), "WT"))
    output = segmenter(torch.from_numpy(z)[None], [box], tokens=range(N_TOKENS))
    return (output.logits[0] > 0).numpy()


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--model", default="vit_t")
    parser.add_argument("--weights", default="official")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--step", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    model = ModelConfig(name=options.model, weights=options.weights, image_size=options.image_size)
    zero_shot = MethodConfig(name="zero_shot")
    segmenter = build_segmenter(model, zero_shot, FusionConfig(), MODALITIES, ["WT"], 0, torch.device("cpu")).eval()
    areas, overlap, reference = [], np.zeros((N_TOKENS, len(REGIONS))), np.zeros(len(REGIONS))
    for case in track(read_slices(options.cases, options.step), "cases"):
        for n in range(len(case.ks)):
            masks = token_masks(segmenter, case, n)
            wanted = np.stack([region_mask(np.asarray(case.label[n]), region) for region in REGIONS])
            areas.append(masks.sum(axis=(1, 2)))
            overlap += np.einsum("txy,rxy->tr", masks.astype(np.int64), wanted.astype(np.int64))
            reference += wanted.sum(axis=(1, 2))
    area = np.array(areas)
    dice = 2 * overlap / (area.sum(axis=0)[:, None] + reference)
    largest, smallest = (np.bincount(pick(area[:, 1:], axis=1), minlength=3) for pick in (np.argmax, np.argmin))
    print("| token | mean area | largest of 1-3 | smallest of 1-3 | " + " | ".join(f"Dice {r}" for r in REGIONS) + " |")
    print("|---|" + "---:|" * (3 + len(REGIONS)))
    for token in range(N_TOKENS):
        counts = [""] * 2 if token == 0 else [str(largest[token - 1]), str(smallest[token - 1])]
        row = [f"{area[:, token].mean():.0f}", *counts, *(f"{d:.3f}" for d in dice[token])]
        print(f"| {token} | " + " | ".join(row) + " |")
    print(f"\n{options.model}, {options.image_size} px, {len(area)} slices.")


if __name__ == "__main__":
    main()
