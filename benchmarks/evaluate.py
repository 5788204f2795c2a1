"""What scoring a case costs: this package against MONAI and scipy used plainly, on one synthetic pair of label maps.

    python benchmarks/evaluate.py [--rounds 3] [--challenge brats2023-gli]

The pair fills 240 x 240 x 155 voxels with one tumour of three labels, and a prediction shifted and roughened. Every
variant scores WT, TC and ET from ready masks, in one process and one thread, alternating round by round; the first
round is dropped. Printed are CPU seconds (median) and the median of the per-round ratios to ours.

- ours: every column of a row with a challenge (overlap, surfaces, lesions), after `isin` on the label maps.
- MONAI: Dice, HD95, NSD at 1 and 2 mm and ASSD of its metric functions (border voxels, no lesion-wise scores).
- scipy: the definitions of BraTS on whole volumes: distance transforms, labelling and dilation, nothing cropped.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from scipy import ndimage

from medsam_lora import labels
from medsam_lora.geometry import Geometry
from medsam_lora.metrics.lesionwise import CHALLENGES, Challenge
from medsam_lora.metrics.marching_cubes import surface_areas
from medsam_lora.metrics.overlap import Comparison
from medsam_lora.metrics.per_case import region_scores

SHAPE = (240, 240, 155)
GRID = Geometry(SHAPE, np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1.0]]))

Masks = dict[str, tuple[np.ndarray, np.ndarray]]
Scores = dict[str, dict[str, float]]


def label_maps(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
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


def ours(reference: np.ndarray, prediction: np.ndarray, challenge: str) -> Scores:
    """What `evaluate` does between reading a case and writing its rows."""
    return {
        region: region_scores(
            Comparison(labels.region_mask(reference, region), labels.region_mask(prediction, region), GRID), challenge
        )
        for region in labels.REGIONS
    }


def monai_plain(masks: Masks) -> Scores:
    """MONAI's own functions on the three regions as channels."""
    import torch
    from monai import metrics

    reference, prediction = (
        torch.from_numpy(np.stack([pair[which] for pair in masks.values()]))[None].float() for which in (0, 1)
    )
    pair = {"y_pred": prediction, "y": reference, "include_background": True}
    columns = {
        "dice": metrics.compute_dice(**pair),
        "hd95_mm": metrics.compute_hausdorff_distance(**pair, percentile=95),
        "assd_mm": metrics.compute_average_surface_distance(**pair, symmetric=True),
        "nsd_1mm": metrics.compute_surface_dice(**pair, class_thresholds=[1.0] * len(masks), use_subvoxels=True),
        "nsd_2mm": metrics.compute_surface_dice(**pair, class_thresholds=[2.0] * len(masks), use_subvoxels=True),
    }
    return {region: {name: float(column[0, i]) for name, column in columns.items()} for i, region in enumerate(masks)}


def scipy_plain(masks: Masks, challenge: Challenge) -> Scores:
    """The definitions of BraTS with scipy's operations on whole volumes."""
    return {region: _scipy_region(*pair, challenge) for region, pair in masks.items()}


def _scipy_region(reference: np.ndarray, prediction: np.ndarray, challenge: Challenge) -> dict[str, float]:
    touching, element = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)

    def grow(mask: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(mask, element, iterations=challenge.dilation_steps)

    lesions, n_lesions = ndimage.label(grow(reference), touching)
    components, n_components = ndimage.label(prediction, touching)
    used: set[int] = set()
    dices, distances = [], []
    for number in range(1, n_lesions + 1):
        lesion = (lesions == number) & reference
        near = set(np.unique(components[grow(lesion)]).tolist()) - {0}
        used |= near
        if lesion.sum() <= challenge.ignored_volume_mm3:
            continue
        found = np.isin(components, sorted(near))
        dices.append(2 * (lesion & found).sum() / (lesion.sum() + found.sum()))
        distances.append(_scipy_hd95(lesion, found)[0] if near else 374.0)
    fp = n_components - len(used)
    n = len(dices) + fp
    hd95, assd, near_1, near_2 = _scipy_hd95(reference, prediction)
    return {
        "dice": 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum()),
        "hd95_mm": hd95,
        "assd_mm": assd,
        "nsd_1mm": near_1,
        "nsd_2mm": near_2,
        "lesionwise_dice": sum(dices) / n,
        "lesionwise_hd95_mm": (sum(distances) + 374 * fp) / n,
    }


def _scipy_hd95(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    kernel = 1 << np.arange(7, -1, -1).reshape(2, 2, 2)
    table = surface_areas(1.0, 1.0, 1.0)
    codes = [ndimage.correlate(np.pad(m, 1).astype(np.uint8), kernel, mode="constant") for m in (a, b)]
    edges = [(code != 0) & (code != 255) for code in codes]
    transforms = [ndimage.distance_transform_edt(~edge) for edge in edges]
    directed, pooled, area = [], [], []
    for own, other in ((0, 1), (1, 0)):
        d, w = transforms[other][edges[own]], table[codes[own]][edges[own]]
        order = np.lexsort((w, d))
        d, w = d[order], w[order]
        directed.append(d[np.searchsorted(np.cumsum(w) / w.sum(), 0.95)])
        pooled.append(d)
        area.append(w)
    d, w = np.concatenate(pooled), np.concatenate(area)
    return float(max(directed)), float(d @ w / w.sum()), *(float(w[d <= mm].sum() / w.sum()) for mm in (1, 2))


def measure(variants: dict[str, Callable[[], Scores]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every variant, alternating."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 1):
        for name, work in variants.items():
            started = time.process_time()
            work()
            if index:
                taken[name].append(time.process_time() - started)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--challenge", choices=list(CHALLENGES), default="brats2023-gli")
    options = parser.parse_args()
    reference, prediction = label_maps()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = ours(reference, prediction, options.challenge)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import torch

    torch.set_num_threads(1)
    masks = {r: (labels.region_mask(reference, r), labels.region_mask(prediction, r)) for r in labels.REGIONS}
    variants: dict[str, Callable[[], Scores]] = {
        "ours": lambda: ours(reference, prediction, options.challenge),
        "MONAI": lambda: monai_plain(masks),
        "scipy": lambda: scipy_plain(masks, CHALLENGES[options.challenge]),
    }
    for name in ("MONAI", "scipy"):
        for region, row in variants[name]().items():
            shown = ", ".join(f"{key} {value:.4f} ({scores[region][key]:.4f})" for key, value in row.items())
            print(f"{name:<6}{region:<4}{shown}")
    taken = measure(variants, options.rounds)
    for name, seconds in taken.items():
        ratio = median(own / base for own, base in zip(seconds, taken["ours"], strict=True))
        print(f"{name:<6}{median(seconds):8.3f} s  {ratio:6.1f} x ours")
    print(
        f"peak memory of this process: {before / 1024:.0f} MiB with the label maps, {peak / 1024:.0f} MiB after scoring"
    )


if __name__ == "__main__":
    main()
