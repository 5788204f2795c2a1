"""How well the embedded vit_nano outlines held-out synthetic shapes and scenes: tables and a picture.

    python benchmarks/nano.py [--shapes 256] [--scenes 128] [--figure FILE.png]

IoU on the pixels of the picture, 256 px, exact boxes: by prompt, by the size of the object, and by how much of its box
an object fills. The picture shows held-out scenes (contour: the object asked for; colour: the answer).
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from medsam_lora.datasets.scenes import make_scene
from medsam_lora.datasets.shapes import box_of, make_sample
from medsam_lora.models.sam import SamModel, build
from medsam_lora.training.held_out import HELD_OUT_SEED, scene_iou, shape_iou
from medsam_lora.training.scene_batch import normalised, points_in

SIDES = (0.0, 0.2, 0.3, 0.45, 1.0)
FILLS = (0.0, 0.4, 0.55, 0.7, 1.0)


def table(name: str, values: np.ndarray, edges: tuple[float, ...], iou: np.ndarray, floor: np.ndarray) -> None:
    """Print mean IoU and that of the filled box between each two edges."""
    print(f"| {name} | shapes | IoU | filled box |\n|---|---:|---:|---:|")
    for low, high in itertools.pairwise(edges):
        these = (values >= low) & (values < high)
        print(f"| {low:g}-{high:g} | {these.sum()} | {iou[these].mean():.3f} | {floor[these].mean():.3f} |")


@torch.no_grad()
def figure(path: Path, sam: SamModel, columns: int = 8) -> None:
    """Draw scenes with the answers to a box, a point and nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sheet, axes = plt.subplots(3, columns, figsize=(1.7 * columns, 5.3), layout="constrained")
    for column in range(columns):
        generator = np.random.default_rng([HELD_OUT_SEED, 4, column])
        scene = make_scene(generator, sam.image_size)
        embedding = sam.encode(normalised(torch.from_numpy(scene.image)[None, None]))
        mask = scene.masks[-1]
        i0, j0, i1, j1 = box_of(mask)
        point = points_in(generator, mask, 1)
        with_box, _ = sam.decode(embedding, torch.tensor([[j0, i0, j1, i1]]), [1])
        with_point, trust = sam.decode(embedding, None, [1], points=(torch.from_numpy(point)[None], torch.ones(1, 1)))
        best = 1 + int(trust[0, 1:].argmax())
        answers = (with_box[0, 0], with_point[0, best], sam.decode(embedding, None)[0][0, 0])
        for axis, answer, truth in zip(axes[:, column], answers, (mask, mask, scene.painted), strict=True):
            whole = F.interpolate(answer[None, None], mask.shape, mode="bilinear", align_corners=False)[0, 0] > 0
            axis.imshow(scene.image, cmap="gray", vmin=0, vmax=255)
            axis.imshow(np.ma.masked_where(~whole.numpy(), whole.numpy()), cmap="autumn", alpha=0.45)
            axis.contour(truth, [0.5], colors=["cyan"], linewidths=0.9)
            axis.set(xticks=[], yticks=[])
        axes[0, column].plot([j0, j1, j1, j0, j0], [i0, i0, i1, i1, i0], color="lime", linewidth=0.9)
        axes[1, column].plot(*point[0], "*", color="lime", markersize=7)
    for axis, name in zip(axes[:, 0], ("box", "point", "no prompt"), strict=True):
        axis.set_ylabel(name)
    sheet.savefig(path, dpi=90)


def main() -> None:
    """Print the tables; draw the picture where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="official", help="A file; by default the embedded weights.")
    parser.add_argument("--shapes", type=int, default=256)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    sam = build("vit_nano", options.weights)
    size = sam.image_size
    samples = [make_sample(np.random.default_rng([HELD_OUT_SEED, i]), size) for i in range(options.shapes)]
    sides = np.array([[s.box[2] - s.box[0], s.box[3] - s.box[1]] for s in samples])
    floor = np.array([s.mask.sum() for s in samples]) / sides.prod(axis=1)
    iou = shape_iou(sam, options.shapes).numpy()
    scenes = scene_iou(sam, options.scenes)
    print("| prompt | of | IoU | filled box |\n|---|---|---:|---:|")
    print(f"| box | {options.shapes} shapes | {iou.mean():.3f} | {floor.mean():.3f} |")
    print(f"| box | {options.scenes} scenes | {scenes['box']:.3f} | {scenes['box_floor']:.3f} |")
    print(f"| one point, the mask that the model trusts | {options.scenes} scenes | {scenes['point']:.3f} | |")
    print(f"| one point, the best of three masks | {options.scenes} scenes | {scenes['point_best']:.3f} | |")
    print(f"| none: all that was painted | {options.scenes} scenes | {scenes['none']:.3f} | |\n")
    print(f"standard error of the mean over the shapes: {iou.std(ddof=1) / len(iou) ** 0.5:.4f}\n")
    table("longest side / picture", sides.max(axis=1) / size, SIDES, iou, floor)
    print()
    table("filled share of its box", floor, FILLS, iou, floor)
    if options.figure is not None:
        figure(options.figure, sam)


if __name__ == "__main__":
    main()
