"""Contrasts of the four modalities, and what the scanner does to them."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.datasets.phantom_anatomy import Tissue
from medsam_lora.datasets.phantom_image import render, scan
from medsam_lora.datasets.phantom_tumour import Pathology
from medsam_lora.geometry import Geometry
from medsam_lora.labels import MODALITIES

T1N, T1C, T2F, T2W = (MODALITIES.index(name) for name in ("t1n", "t1c", "t2f", "t2w"))
COUNT = 300


def pure(kind: str, count: int = COUNT) -> Tissue:
    shares = {name: np.full(count, float(name == kind), np.float32) for name in ("csf", "grey", "white")}
    deep = np.full(count, 30.0, np.float32)
    return Tissue(head=deep, surface=deep, midline=deep, **shares)


def places(count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(0).uniform(-50, 50, (3, count)).astype(np.float32)


def signals(kind: str, pathology: Pathology | None = None, seed: int = 0) -> np.ndarray:
    return np.median(render(pure(kind), pathology, places(), np.random.default_rng(seed)), axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_order_of_tissues_in_each_modality(seed: int) -> None:
    white, grey, csf = (signals(kind, seed=seed) for kind in ("white", "grey", "csf"))
    assert (white[[T1N, T1C]] > grey[[T1N, T1C]]).all()
    assert (grey[[T1N, T1C]] > csf[[T1N, T1C]]).all()
    # T2 turns them round; t2f has the fluid suppressed.
    assert csf[T2W] > 1.8 * grey[T2W] > 1.8 * white[T2W]
    assert grey[T2F] > white[T2F] > 2 * csf[T2F]


def lesion(core: float, rim: float, oedema: float) -> Pathology:
    return Pathology(*(np.full(COUNT, value, np.float32) for value in (core, rim, oedema)))


@pytest.mark.parametrize("seed", range(4))
def test_tumour_stands_out_where_it_should(seed: int) -> None:
    white = signals("white", seed=seed)
    oedema = signals("white", lesion(-50, 0, 30), seed)
    enhancing = signals("white", lesion(2, 20, 30), seed)
    necrosis = signals("white", lesion(20, 3, 30), seed)
    assert (oedema[[T2F, T2W]] > 1.3 * white[[T2F, T2W]]).all()
    assert oedema[T1C] < 1.05 * white[T1C]
    assert enhancing[T1C] > 1.15 * white[T1C]
    assert enhancing[T1N] < white[T1N]
    assert necrosis[T1C] < white[T1C]
    assert necrosis[T2W] > oedema[T2W]


def test_nothing_far_from_tumour_changes() -> None:
    far = lesion(-80, 0, -80)
    with_tumour = render(pure("grey"), far, places(), np.random.default_rng(3))
    assert np.array_equal(with_tumour, render(pure("grey"), None, places(), np.random.default_rng(3)))


def scanned(seed: int = 0, affine: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    grid = np.indices((24, 24, 24)) - 11.5
    mask = (grid**2).sum(axis=0) < 10**2
    geometry = Geometry((24, 24, 24), np.eye(4) if affine is None else affine)
    points = grid.reshape(3, -1)[:, mask.ravel()].astype(np.float32)
    return scan(np.ones((4, int(mask.sum())), np.float32), mask, points, geometry, np.random.default_rng(seed)), mask


def test_background_is_zero_and_brain_never() -> None:
    images, mask = scanned()
    assert images.dtype == np.int16
    assert (images[:, ~mask] == 0).all()
    assert (images[:, mask] >= 1).all()


def test_noise_is_there_scales_differ_and_the_cut_leaves_no_dark_rim() -> None:
    images, mask = scanned()
    edge = mask & ~(np.roll(mask, 2, 0) & np.roll(mask, -2, 0) & np.roll(mask, 2, 1) & np.roll(mask, -2, 1))
    for image in images:
        values = image[mask].astype(float)
        assert 0.005 < values.std() / values.mean() < 0.1
        assert image[edge].mean() / values.mean() == pytest.approx(1.0, abs=0.03)
    assert np.ptp([float(np.median(image[mask])) for image in images]) > 50


def test_noise_of_fluid_is_rician() -> None:
    # With a signal of 0 the magnitude of complex noise has mean sigma sqrt(pi/2), not 0: values far above 1.
    grid = np.indices((20, 20, 20)).reshape(3, -1).astype(np.float32)
    mask = np.ones((20, 20, 20), bool)
    images = scan(
        np.zeros((4, 8000), np.float32), mask, grid, Geometry((20, 20, 20), np.eye(4)), np.random.default_rng(0)
    )
    for image in images:
        values = image[image > 1].astype(float)
        # Rayleigh: standard deviation over mean is sqrt(4/pi - 1) = 0.523.
        assert values.std() / values.mean() == pytest.approx(0.523, abs=0.09)
