"""Every column of a challenge against a slow oracle, on hundreds of small random label maps.

The oracle is the evaluation of BraTS 2023 put down once more and plainly: whole volumes, scipy's own labelling,
dilation and distance transforms, nothing cropped and nothing measured twice. It shares no code with the package; the
areas of surface elements come from the normals that MONAI carries.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medsam_lora.geometry import Geometry
from medsam_lora.metrics.boxes import islands
from medsam_lora.metrics.per_case import region_scores
from medsam_lora.stages.scoring import compare

N_CASES = 120
PARAMETERS = {"gli": (3, 50), "men": (1, 50), "met": (1, 2), "ssa": (3, 50), "ped": (3, 50)}
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
MEANINGS = {label: frozenset({label}) for label in (1, 2, 3)}
SPACINGS = [
    (1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.5, 2.0, 3.0), (0.7, 0.7, 5.0),
    (0.9375, 0.9375, 1.2), (1.0, 5.0, 2.0), (3.0, 3.0, 3.0),
]  # fmt: skip


def areas_of(spacing: np.ndarray) -> np.ndarray:
    normals = pytest.importorskip("monai.metrics.utils")._get_neighbour_code_to_normals_table().numpy().astype(float)
    x, y, z = spacing
    return np.linalg.norm(normals * [y * z, x * z, x * y], axis=-1).sum(axis=-1)


class Oracle:
    """Scores of two masks with scipy alone."""

    def __init__(self, reference: np.ndarray, prediction: np.ndarray, affine: np.ndarray) -> None:
        self.reference, self.prediction = reference, prediction
        self.spacing = np.linalg.norm(affine[:3, :3], axis=0)
        self.areas = areas_of(self.spacing)

    def surface(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kernel = np.array([128, 64, 32, 16, 8, 4, 2, 1]).reshape(2, 2, 2)
        # One cell more at the upper end: correlate centres a kernel of two on its second voxel.
        codes = ndimage.correlate(np.pad(mask, (0, 1)).astype(np.uint8), kernel, mode="constant", cval=0)
        return (codes != 0) & (codes != 255), self.areas[codes]

    def directed(self, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (edges, areas), (others, _) = self.surface(one), self.surface(other)
        transform = ndimage.distance_transform_edt(~others, sampling=self.spacing)
        pairs = sorted(zip(transform[edges].tolist(), areas[edges].tolist(), strict=True))
        return np.array([d for d, _ in pairs]), np.array([a for _, a in pairs])

    def hd95(self, one: np.ndarray, other: np.ndarray) -> float:
        found = []
        for distances, areas in (self.directed(one, other), self.directed(other, one)):
            share = np.cumsum(areas) / np.sum(areas)
            found.append(distances[min(np.searchsorted(share, 0.95), len(distances) - 1)])
        return max(found)

    def surfaces(self) -> dict[str, float]:
        a, b = self.reference, self.prediction
        if not a.any() or not b.any():
            share, distance = (0.0, 374.0) if a.any() or b.any() else (1.0, 0.0)
            return {"hd95_mm": distance, "nsd_1mm": share, "nsd_2mm": share, "assd_mm": distance}
        there, back = self.directed(a, b), self.directed(b, a)
        distances, areas = (np.concatenate(both) for both in zip(there, back, strict=True))
        return {
            "hd95_mm": self.hd95(a, b),
            "nsd_1mm": areas[distances <= 1].sum() / areas.sum(),
            "nsd_2mm": areas[distances <= 2].sum() / areas.sum(),
            "assd_mm": (distances * areas).sum() / areas.sum(),
        }

    def lesions(self, steps: int, ignored_mm3: float) -> dict[str, float]:
        corners, element = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)

        def grown(mask: np.ndarray) -> np.ndarray:
            return ndimage.binary_dilation(mask, structure=element, iterations=steps)

        components, n_components = ndimage.label(self.prediction, structure=corners)
        joined, n_lesions = ndimage.label(grown(self.reference), structure=corners)
        matched, dices, distances = set(), [], []
        tp = fn = 0
        for number in range(1, n_lesions + 1):
            lesion = self.reference & (joined == number)
            own = {int(i) for i in np.unique(components[grown(lesion)]) if i > 0}
            matched |= own
            if lesion.sum() * float(np.prod(self.spacing.astype(np.float32).astype(float))) <= ignored_mm3:
                continue
            found = np.isin(components, list(own))
            tp, fn = tp + bool(own), fn + (not own)
            dices.append(2 * (lesion & found).sum() / (lesion.sum() + found.sum()) if own else 0.0)
            distances.append(self.hd95(lesion, found) if own else 374.0)
        fp = n_components - len(matched)
        n = len(dices) + fp
        return {
            "lesionwise_dice": sum(dices) / n if n else 1.0,
            "lesionwise_hd95_mm": (sum(distances) + 374 * fp) / n if n else 0.0,
            "lesions_tp": tp,
            "lesions_fp": fp,
            "lesions_fn": fn,
        }

    def row(self, challenge: str) -> dict[str, float]:
        a, b = self.reference, self.prediction
        tp, fp, fn, tn = (int(m.sum()) for m in (a & b, ~a & b, a & ~b, ~a & ~b))
        empty = {(False, False): 1.0, (True, False): 0.0, (False, True): 0.0}.get((bool(a.any()), bool(b.any())))
        dice = 2 * tp / (2 * tp + fp + fn) if empty is None else empty
        voxel_ml = np.prod(self.spacing) / 1000
        surfaces = self.surfaces()
        return {
            "dice": dice,
            "iou": tp / (tp + fp + fn) if empty is None else empty,
            "sensitivity": tp / (tp + fn) if empty is None else empty,
            "precision": tp / (tp + fp) if empty is None else empty,
            "specificity": tn / (tn + fp) if tn + fp else 1.0,
            "reference_volume_ml": (tp + fn) * voxel_ml,
            "prediction_volume_ml": (tp + fp) * voxel_ml,
            "volume_difference_ml": (fp - fn) * voxel_ml,
            **surfaces,
            **self.lesions(*PARAMETERS[challenge]),
            "legacy_dice": dice,
            "legacy_hd95_mm": surfaces["hd95_mm"],
        }


def affine_of(rng: np.random.Generator) -> np.ndarray:
    """Of any spacing; axis-aligned with any signs, or turned."""
    affine = np.eye(4)
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    turn = np.diag(rng.choice([-1.0, 1.0], 3))
    if rng.random() < 0.3:
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    affine[:3, :3] = turn * np.array(SPACINGS[rng.integers(len(SPACINGS))])
    return affine


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.normal(size=shape), rng.uniform(0.5, 2.0))
    return noise / (noise.std() + 1e-12)


def blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rough pieces of all labels, and the same with other noise mixed in."""
    maps = np.zeros((2, *shape), np.uint8)
    for label in rng.permutation([1, 2, 3]):
        level, share = rng.uniform(0.8, 2.5), rng.uniform(0, 1)
        noise, other = smooth(rng, shape), smooth(rng, shape)
        maps[0][noise > level] = label
        maps[1][(1 - share) * noise + share * other > level] = label
    return maps[0], maps[1]


def boxes(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes a few voxels apart, some of them lost, moved or joined in the prediction."""
    maps = np.zeros((2, *shape), np.uint8)
    for _ in range(rng.integers(1, 7)):
        size = rng.integers(1, 6, 3)
        low = np.array([rng.integers(0, max(n - s, 0) + 1) for n, s in zip(shape, size, strict=True)])
        label = rng.integers(1, 4)
        for which, kept in ((0, 0.85), (1, 0.8)):
            moved = low + (which and rng.random() < 0.5) * rng.integers(-2, 3, 3)
            if rng.random() < kept:
                maps[which][tuple(slice(max(a, 0), max(a + s, 0)) for a, s in zip(moved, size, strict=True))] = label
    if rng.random() < 0.3:
        # One component over all lesions: from border to border, or the box around them.
        shown = np.nonzero(maps[0]) if maps[0].any() and rng.random() < 0.7 else np.indices(shape).reshape(3, -1)
        maps[1][tuple(slice(axis.min(), axis.max() + 1) for axis in shown)] = 3
    return maps[0], maps[1]


def specks(rng: np.random.Generator, shape: tuple[int, ...], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A lesion just below, at or above either threshold, and a prediction that meets or misses it."""
    voxel = np.prod(np.linalg.norm(affine[:3, :3], axis=0))
    n = max(round(rng.choice([2, 50]) / voxel) + int(rng.integers(-1, 2)), 1)
    reference, prediction = boxes(rng, shape)
    # The n voxels nearest to a point are one piece.
    at = [rng.integers(0, m) for m in shape]
    distance = sum((axis - a) ** 2 for axis, a in zip(np.indices(shape), at, strict=True))
    reference.ravel()[np.argsort(distance, axis=None, kind="stable")[:n]] = 3
    if rng.random() < 0.5:
        prediction[tuple(at)] = 3
    return reference, prediction


def label_maps(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    rng = np.random.default_rng(seed)
    affine, challenge = affine_of(rng), list(PARAMETERS)[rng.integers(5)]
    shape = tuple(int(n) for n in rng.integers(4, 22, 3))
    if rng.random() < 0.3:
        # Long enough for parts that are dealt with one by one.
        shape = tuple(np.where(np.arange(3) == rng.integers(3), 3 * np.array(shape), shape).tolist())
    if rng.random() < 0.15:
        shape = tuple(np.where(np.arange(3) == rng.integers(3), 1, shape).tolist())
    kind = rng.integers(3)
    reference, prediction = (
        specks(rng, shape, affine) if kind == 2 else boxes(rng, shape) if kind == 1 else blobs(rng, shape)
    )
    for label_map in (reference, prediction):
        if rng.random() < 0.08:
            label_map[:] = 0
        elif rng.random() < 0.05:
            label_map[:] = 2  # tumour from border to border
    return reference, prediction, affine, challenge


@pytest.mark.parametrize("seed", range(N_CASES))
def test_equal_to_the_oracle(seed: int):
    reference, prediction, affine, challenge = label_maps(seed)
    pairs = compare(reference, prediction, MEANINGS, list(REGIONS), Geometry(reference.shape, affine))
    for region, values in REGIONS.items():
        found = region_scores(pairs[region], f"brats2023-{challenge}")
        expected = Oracle(np.isin(reference, values), np.isin(prediction, values), affine).row(challenge)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0, abs=1e-9), region
        assert set(found) - set(expected) == {"n_slices", "challenge"}


def test_the_cases_are_of_every_kind():
    # A test of the test: what is meant to be tried out does occur.
    kinds = ["missed", "found", "in vain", "several", "empty", "flat", "ignored", "shared", "in parts"]
    seen = dict.fromkeys(kinds, 0)
    for seed in range(N_CASES):
        reference, prediction, affine, challenge = label_maps(seed)
        steps, ignored = PARAMETERS[challenge]
        oracle = Oracle(reference > 0, prediction > 0, affine)
        row, all_lesions = oracle.lesions(steps, ignored), oracle.lesions(steps, 0)
        seen["missed"] += row["lesions_fn"] > 0
        seen["found"] += row["lesions_tp"] > 0
        seen["in vain"] += row["lesions_fp"] > 0
        seen["several"] += row["lesions_tp"] + row["lesions_fn"] > 2
        seen["empty"] += not reference.any() or not prediction.any()
        seen["in parts"] += len(islands((reference > 0) | (prediction > 0))) > 1
        seen["flat"] += 1 in reference.shape
        total = [scores["lesions_tp"] + scores["lesions_fn"] for scores in (row, all_lesions)]
        seen["ignored"] += total[0] < total[1]
        seen["shared"] += ndimage.label(prediction > 0, np.ones((3, 3, 3)))[1] < all_lesions["lesions_tp"]
    assert min(seen.values()) >= 3, seen
