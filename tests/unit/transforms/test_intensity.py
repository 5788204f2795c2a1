"""The z-score against hand values, MONAI, and a slow oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.transforms import NormalizeIntensity

from medsam_lora.transforms.intensity import statistics, zscore


@pytest.fixture
def image() -> np.ndarray:
    """Four modalities with background, shape (4, 9, 8, 5)."""
    generator = np.random.default_rng(2)
    voxels = generator.integers(1, 3000, (4, 9, 8, 5)).astype(np.int16)
    voxels[:, generator.random((9, 8, 5)) < 0.4] = 0
    return voxels


def test_by_hand():
    # Non-zero 2, 4, 9: mean 5, variance (9 + 1 + 16) / 3. All with the zero: mean 3.75, variance 44.75 / 4.
    raw = np.array([[[[0], [2]], [[4], [9]]]], np.int16)  # (1, 2, 2, 1)
    mean, std = statistics(raw, "nonzero", "volume", [0])
    assert mean.tolist() == [[5.0]] and std[0, 0] == pytest.approx(np.sqrt(26 / 3), rel=1e-15)
    mean, std = statistics(raw, "all", "volume", [0])
    assert mean.tolist() == [[3.75]] and std[0, 0] == pytest.approx(np.sqrt(44.75 / 4), rel=1e-15)


def test_scope_slice_measures_each_slice_and_scope_volume_all(image):
    ks = [4, 1]
    mean, std = statistics(image, "nonzero", "slice", ks)
    assert mean.shape == std.shape == (2, 4) and mean.dtype == np.float64
    for n, k in enumerate(ks):
        for m in range(4):
            values = [float(v) for v in image[m, :, :, k].ravel() if v != 0]
            assert mean[n, m] == pytest.approx(sum(values) / len(values), rel=1e-12)
            assert std[n, m] == pytest.approx(np.std(values), rel=1e-12)
    whole, _ = statistics(image, "nonzero", "volume", ks)
    assert (whole[0] == whole[1]).all()
    assert whole[0, 2] == pytest.approx(image[2][image[2] != 0].mean(dtype=np.float64), rel=1e-12)


def test_no_slices_give_empty_statistics(image):
    for scope in ("volume", "slice"):
        mean, std = statistics(image, "nonzero", scope, [])
        assert mean.shape == std.shape == (0, 4)
    with pytest.raises(ValueError, match="scope"):
        statistics(image, "nonzero", "case", [0])


@pytest.mark.parametrize("voxels", ["nonzero", "all"])
def test_equals_monai_over_the_volume(image, voxels):
    theirs = NormalizeIntensity(nonzero=voxels == "nonzero", channel_wise=True)(torch.from_numpy(image).float())
    mean, std = statistics(image, voxels, "volume", range(5))
    for k in range(5):
        ours = zscore(image[..., k], mean[k], std[k], voxels)
        np.testing.assert_allclose(ours, np.asarray(theirs)[..., k], atol=2e-6)


@pytest.mark.parametrize("value", [5.0, 0.1])
def test_a_constant_channel_is_zero_and_not_a_division_by_zero(value):
    raw = np.full((1, 3, 3, 2), value, np.float32)
    raw[0, 0, 0] = 0
    mean, std = statistics(raw, "nonzero", "volume", [0, 1])
    assert std.tolist() == [[1.0], [1.0]]
    normal = zscore(raw[..., 0], mean[0], std[0], "nonzero")
    np.testing.assert_allclose(normal, 0, atol=1e-7)
    theirs = np.asarray(NormalizeIntensity(nonzero=True, channel_wise=True)(torch.from_numpy(raw)))[..., 0]
    if value == 5.0:
        np.testing.assert_allclose(normal, theirs, atol=1e-6)
    else:
        # Where float32 cannot hold the value exactly, MONAI divides one rounding error by another.
        assert np.abs(theirs).max() > 0.5


def test_a_slice_without_voxels_that_count_stays_zero():
    raw = np.zeros((2, 3, 3, 1), np.int16)
    mean, std = statistics(raw, "nonzero", "slice", [0])
    assert mean.tolist() == [[0.0, 0.0]] and std.tolist() == [[1.0, 1.0]]
    assert not zscore(raw[..., 0], mean[0], std[0], "nonzero").any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_not_finite_harms_neither_statistics_nor_neighbours(bad):
    # MONAI makes the whole volume NaN here.
    raw = np.array([[[[0.0], [2.0]], [[bad], [4.0]]]], np.float32)
    for voxels, expected in (("nonzero", (3.0, 1.0)), ("all", (2.0, np.sqrt(8 / 3)))):
        mean, std = statistics(raw, voxels, "volume", [0])
        assert (mean[0, 0], std[0, 0]) == pytest.approx(expected)
        normal = zscore(raw[..., 0], mean[0], std[0], voxels)
        assert np.isfinite(normal).all() and normal[0, 1, 0] == 0.0


@pytest.mark.parametrize("voxels", ["nonzero", "all"])
def test_numpy_and_torch_agree_and_take_memory_maps_types_and_leading_axes(image, voxels, tmp_path):
    mean, std = statistics(image, voxels, "slice", range(5))
    stack = np.ascontiguousarray(np.moveaxis(image, -1, 0))  # (5, 4, 9, 8)
    np.save(tmp_path / "stack.npy", stack)
    mapped = np.load(tmp_path / "stack.npy", mmap_mode="r")
    ours = zscore(mapped, mean, std, voxels)
    theirs = zscore(torch.from_numpy(stack), torch.from_numpy(mean), std, voxels)
    assert ours.dtype == np.float32 and theirs.dtype == torch.float32
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    np.testing.assert_allclose(zscore(stack[3], mean[3], std[3], voxels), ours[3], atol=0)
    if voxels == "nonzero":
        assert (ours[stack == 0] == 0.0).all() and (theirs.numpy()[stack == 0] == 0.0).all()
    else:
        assert (ours[stack == 0] < 0).all()


def test_the_mean_of_a_large_volume_is_exact_where_float32_sums_drift():
    raw = np.full((1, 200, 200, 40), 3000, np.int16)
    raw[0, :, :, :20] = 1
    mean, std = statistics(raw, "nonzero", "volume", [0])
    assert mean[0, 0] == 1500.5 and std[0, 0] == 1499.5
