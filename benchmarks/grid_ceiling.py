"""The best Dice that SAM's mask decoder can reach, because its grid is coarser than the image.

The reference of every case is brought to the model frame, averaged down to the decoder grid (a quarter of the
frame's side), brought back bilinearly as predictions are, and cut at one half. Printed are the mean and the lowest
volumetric Dice over the cases, as rows of a Markdown table.

    python benchmarks/grid_ceiling.py CASES_FOLDER
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from medsam_lora.io.case import read_case
from medsam_lora.io.manifest import discover
from medsam_lora.labels import region_mask
from medsam_lora.progress import track
from medsam_lora.records import CaseVolumes, PreparedSlices
from medsam_lora.transforms.cropping import CropPlan, crop_window, union_box
from medsam_lora.transforms.resizing import model_scale, through_decoder_grid
from medsam_lora.transforms.stages import PreparePlan, case_brain_box, prepare_case

IMAGE_SIZES = (1024, 512, 256)
BATCH = 8


def ceiling(slices: PreparedSlices, region: str, image_size: int) -> float:
    """Volumetric Dice of a case after the decoder grid; what the crop cut off counts as missed."""
    assert slices.label is not None
    masks = torch.from_numpy(region_mask(np.asarray(slices.label), region))[:, None]
    kept = torch.cat([through_decoder_grid(part, image_size) for part in masks.split(BATCH)])
    n_reference = int(masks.sum()) + int(slices.report["tumour_voxels_lost"] or 0)
    return 2 * int((kept & masks).sum()) / (n_reference + int(kept.sum()))


def cases_in(folder: Path) -> Iterator[CaseVolumes]:
    """Every case of a folder that has a reference."""
    for record in track(discover(folder), "cases"):
        if "seg" in record.files:
            # As an evaluation case, every tumour slice is kept.
            yield read_case(replace(record, split="test"), folder)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of BraTS cases")
    parser.add_argument("--region", default="WT", help="WT, TC or ET [WT]")
    arguments = parser.parse_args()
    box = union_box([case_brain_box(case) for case in cases_in(arguments.folder)], "all")
    crops = {
        "138 x 202": CropPlan(size=(138, 202), allow_tumour_loss=True),
        "fitted": CropPlan(box=box, allow_tumour_loss=True),
        "240 x 240": CropPlan(size=(240, 240), allow_tumour_loss=True),
    }
    found: dict[tuple[str, int], list[float]] = {(name, size): [] for name in crops for size in IMAGE_SIZES}
    for case in cases_in(arguments.folder):
        for name, crop in crops.items():
            slices = prepare_case(case, PreparePlan(crop=crop))
            for size in IMAGE_SIZES:
                found[name, size].append(ceiling(slices, arguments.region, size))
    print("| crop | image size | pixels per voxel | decoder cells per voxel | mean Dice | lowest Dice |")
    print("|---|---|---|---|---|---|")
    for (name, size), dices in found.items():
        start, stop = crop_window(crops[name], box.plane)
        plane = (stop[0] - start[0], stop[1] - start[1])
        scale, frame = model_scale(plane, size)
        print(
            f"| {name} ({plane[0]} x {plane[1]} to {frame[0]} x {frame[1]}) | {size} | {scale:.2f} | {scale / 4:.2f} "
            f"| {statistics.mean(dices):.4f} | {min(dices):.4f} |"
        )


if __name__ == "__main__":
    main()
