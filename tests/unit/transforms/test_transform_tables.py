"""Contracts over the whole tables of choices: a new entry is tested by being in its table."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from medsam_lora.config import CropConfig, IntensityConfig, SlicingConfig
from medsam_lora.transforms import CROP_CENTRES, NORMALISATIONS, SLICINGS
from medsam_lora.transforms.slicing import SlicingPlan


def choices(section: type, field: str) -> set[str]:
    return set(section.model_fields[field].annotation.__args__)  # type: ignore[attr-defined]


def test_the_configuration_offers_exactly_the_tables():
    assert choices(SlicingConfig, "name") == set(SLICINGS)
    assert choices(CropConfig, "centre") == set(CROP_CENTRES)
    assert choices(IntensityConfig, "voxels") == set(NORMALISATIONS)


@pytest.mark.parametrize("name", SLICINGS)
def test_a_slicing_takes_some_candidates_ascending_once_and_reproducibly(name):
    areas = np.array([0, 3, 0, 5, 5, 1, 2, 0, 4, 1])
    candidates = np.flatnonzero(areas)
    plan = SlicingPlan(name, step=2, count=3)
    before = candidates.copy()
    taken = SLICINGS[name](candidates, areas, plan, np.random.default_rng(3))
    again = SLICINGS[name](candidates, areas, plan, np.random.default_rng(3))
    assert 0 < len(taken) <= len(candidates)
    assert set(taken.tolist()) <= set(candidates.tolist())
    assert (np.diff(taken) > 0).all()
    np.testing.assert_array_equal(taken, again)
    np.testing.assert_array_equal(candidates, before)


@pytest.mark.parametrize("name", SLICINGS)
def test_a_slicing_of_one_candidate_takes_it(name):
    areas = np.array([0, 0, 7])
    taken = SLICINGS[name](np.array([2]), areas, SlicingPlan(name, step=5, count=9), np.random.default_rng(0))
    assert taken.tolist() == [2]


@pytest.mark.parametrize("name", CROP_CENTRES)
@pytest.mark.parametrize(("low", "high"), [(-60.0, 75.0), (-3.5, -1.5), (2.0, 9.0), (-8.0, 8.0)])
def test_a_crop_centre_covers_the_box(name, low, high):
    offset, size = CROP_CENTRES[name](low, high)
    assert offset - size / 2 <= low and high <= offset + size / 2
    # No smaller size about that centre would do.
    assert min(low - (offset - size / 2), offset + size / 2 - high) == 0


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_normalisation_counts_the_same_voxels_in_numpy_and_torch(name):
    raw = np.array([0.0, -2.0, 3.0, np.nan], np.float32)
    ours = NORMALISATIONS[name](raw)
    theirs = NORMALISATIONS[name](torch.from_numpy(raw))
    assert ours.dtype == bool and theirs.dtype == torch.bool
    assert ours[1:3].all(), "a voxel with signal always counts"
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_neither_the_tables_nor_the_prepare_stage_import_torch():
    code = "import sys, medsam_lora.transforms.stages, medsam_lora.stages.prepare; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
