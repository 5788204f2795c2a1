"""Prepared slices made in memory: bright blobs on a dark brain, small enough for a real model at toy size."""

from __future__ import annotations

import numpy as np

from medsam_lora.geometry import Geometry
from medsam_lora.labels import MODALITIES
from medsam_lora.records import PreparedSlices


def make_case(case_id: str, split: str, seed: int, shape: tuple[int, int] = (40, 48), n: int = 3) -> PreparedSlices:
    """A case whose tumour is a bright disc that moves from slice to slice."""
    generator = np.random.default_rng(seed)
    x, y = shape
    ii, jj = np.mgrid[:x, :y]
    brain = ((ii - x / 2) / (0.45 * x)) ** 2 + ((jj - y / 2) / (0.45 * y)) ** 2 < 1
    image = np.zeros((n, 4, x, y), np.int16)
    label = np.zeros((n, x, y), np.uint8)
    for k in range(n):
        centre = generator.uniform(0.35, 0.65, 2) * (x, y)
        disc = (ii - centre[0]) ** 2 + (jj - centre[1]) ** 2 < generator.uniform(3, 7) ** 2
        label[k][disc & brain] = 2
        noise = generator.normal(300, 30, (4, x, y)) + 400 * disc
        image[k] = np.where(brain, np.maximum(noise, 1), 0).astype(np.int16)
    inside = image[:, :, brain].astype(np.float64)
    mean = np.broadcast_to(inside.mean(axis=(0, 2)), (n, 4))
    std = np.broadcast_to(inside.std(axis=(0, 2)), (n, 4))
    grid = Geometry((x, y, n), np.eye(4))
    return PreparedSlices(
        case_id=case_id,
        patient_id=case_id,
        split=split,
        modalities=MODALITIES,
        image=image,
        label=label,
        ks=tuple(range(n)),
        mean=mean,
        std=std,
        voxels="nonzero",
        native=grid,
        crop=grid,
        report={},
    )
