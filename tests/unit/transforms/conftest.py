"""A small case with a known brain and tumour, on any native grid."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from medsam_lora.geometry import Geometry, place
from medsam_lora.labels import MODALITIES
from medsam_lora.records import CaseRecord, CaseVolumes

RAS = Geometry((12, 10, 8), np.diag([1.0, 1.0, 2.0, 1.0]))

GRIDS = {
    "RAS": RAS,
    "LPS": Geometry((12, 10, 8), np.array([[-1, 0, 0, 11], [0, -1, 0, 9], [0, 0, 2, 0], [0, 0, 0, 1.0]])),
    "PSR": Geometry((10, 8, 12), np.array([[0, 0, 1, 0], [-1, 0, 0, 9], [0, 2, 0, 0], [0, 0, 0, 1.0]])),
}


def make_case(codes: str = "RAS", split: str = "train", with_label: bool = True, case_id: str = "a") -> CaseVolumes:
    """The same patient stored in another orientation: brain 2:9 x 1:9 x 1:7, tumour in slices 2, 3 and 4."""
    image = np.zeros((4, *RAS.shape), np.int16)
    image[:, 2:9, 1:9, 1:7] = np.random.default_rng(5).integers(1, 500, (4, 7, 8, 6))
    label = np.zeros(RAS.shape, np.uint8)
    label[3:5, 3:4, 2] = 2  # 2 voxels
    label[3:7, 3:6, 3] = 2  # 12 voxels, one of them necrosis
    label[4, 4, 3] = 1
    label[3:5, 3:6, 4] = 3  # 6 voxels
    grid = GRIDS[codes]
    record = CaseRecord(case_id, "p-" + case_id, split, {}, "brats2023", "f" * 64)
    native = np.stack([place(channel, RAS, grid) for channel in image])
    return CaseVolumes(record, MODALITIES, native, place(label, RAS, grid) if with_label else None, grid)


@pytest.fixture
def case_on() -> Callable[..., CaseVolumes]:
    return make_case


@pytest.fixture
def ras_case() -> CaseVolumes:
    return make_case()
