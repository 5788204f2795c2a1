"""The brain of formulae: known structures where an atlas has them, fractions that add up, symmetry without noise."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.datasets.phantom_anatomy import HEAD_RADII_MM, Anatomy, draw_anatomy, tissue_at
from medsam_lora.datasets.random_fields import RandomField


def constant(value: float) -> RandomField:
    return RandomField(np.full((4, 4, 4), value, np.float32), 10.0)


@pytest.fixture
def smooth_brain() -> Anatomy:
    """A head without any irregularity, and without sulci, as the fold field is zero nowhere."""
    none = constant(0.0)
    return Anatomy(np.eye(3, dtype=np.float32), (none, none, none), constant(9.0), constant(0.1), none, none, 1.0, 0.8)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ((9.5, -5.0, 17.0), "csf"),  # body of the lateral ventricle
        ((0.0, -4.0, -1.0), "csf"),  # third ventricle
        ((0.0, 10.0, 60.0), "csf"),  # interhemispheric fissure
        ((28.0, 4.0, 2.0), "grey"),  # putamen
        ((15.5, 19.0, 9.0), "grey"),  # head of the caudate
        ((30.0, -20.0, 32.0), "white"),  # centrum semiovale
        ((2.0, 0.0, 22.5), "white"),  # corpus callosum
        ((34.0, -15.0, 61.0), "grey"),  # cortex of the vertex
    ],
)
def test_structures_are_where_an_atlas_has_them(
    smooth_brain: Anatomy, place: tuple[float, float, float], kind: str
) -> None:
    tissue = tissue_at(smooth_brain, np.array([place], np.float32).T)
    shares = {name: float(getattr(tissue, name)[0]) for name in ("csf", "grey", "white")}
    assert max(shares, key=lambda name: shares[name]) == kind, shares
    assert tissue.head[0] > 0


def test_left_and_right_are_mirror_images_without_noise(smooth_brain: Anatomy) -> None:
    points = np.random.default_rng(0).uniform(-70, 70, (3, 2000)).astype(np.float32)
    right, left = (tissue_at(smooth_brain, points * np.array([[s], [1], [1]], np.float32)) for s in (1, -1))
    for name in ("head", "csf", "grey", "white", "surface"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), atol=1e-3)
    np.testing.assert_array_equal(left.midline, -right.midline)


def test_a_cortex_of_three_millimetres_lies_under_the_surface(smooth_brain: Anatomy) -> None:
    # Down from the outside to the white matter of the parietal lobe, every 0.25 mm.
    depth = np.arange(0, 30, 0.25, dtype=np.float32)
    line = np.stack([28 + 0 * depth, -15 + 0 * depth, 75 - depth])
    tissue = tissue_at(smooth_brain, line, 0.25)
    grey = depth[tissue.grey > 0.5]
    assert 2.5 < grey[-1] - grey[0] < 4.5
    assert (tissue.white[depth > grey[-1] + 0.5] == 1).all()
    # Fluid between skull and cortex.
    assert (tissue.csf[depth < grey[0] - 0.5] == 1).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heads_of_human_size_and_make_up(seed: int) -> None:
    anatomy = draw_anatomy(np.random.default_rng(seed))
    axes = [np.arange(-r, r, 3.0, dtype=np.float32) for r in HEAD_RADII_MM]
    points = np.stack([a.ravel() for a in np.meshgrid(*axes, indexing="ij")])
    tissue = tissue_at(anatomy, points, 3.0)
    inside = tissue.head > 0
    total = tissue.csf + tissue.grey + tissue.white
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert min(float(f.min()) for f in (tissue.csf, tissue.grey, tissue.white)) > -1e-6
    assert 1100 < inside.sum() * 27 / 1000 < 1900
    shares = {name: float(getattr(tissue, name)[inside].mean()) for name in ("csf", "grey", "white")}
    assert 0.10 < shares["csf"] < 0.35
    assert 0.30 < shares["grey"] < 0.55
    assert 0.25 < shares["white"] < 0.55
    # Nothing of the brain lies outside of the ellipsoid that grids are made to hold.
    outside = ((points / np.array(HEAD_RADII_MM)[:, None]) ** 2).sum(axis=0) > 1.02
    assert (inside & outside).sum() < 0.01 * inside.sum()


def test_no_two_heads_are_alike() -> None:
    points = np.random.default_rng(0).uniform(-60, 60, (3, 500)).astype(np.float32)
    first, second = (tissue_at(draw_anatomy(np.random.default_rng(s)), points).grey for s in (0, 1))
    assert np.abs(first - second).mean() > 0.1


def test_at_keeps_some_points() -> None:
    tissue = tissue_at(draw_anatomy(np.random.default_rng(0)), np.zeros((3, 3), np.float32) + np.arange(3))
    kept = tissue.at(np.array([True, False, True]))
    assert kept.csf.tolist() == tissue.csf[[0, 2]].tolist()
    assert kept.midline.shape == (2,)
