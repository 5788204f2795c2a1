"""Depths of solids against distances known by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.datasets.implicit import capsule, ellipsoid, ramp, rotation, smooth_max, step


def points(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(rows, np.float32).T


def test_depth_of_a_ball_is_the_distance_to_its_surface() -> None:
    p = points((4, 0, 0), (0, 10, 0), (0, 0, 13), (6, 8, 0))
    np.testing.assert_allclose(ellipsoid(p, (0, 0, 0), (10, 10, 10)), [6, 0, -3, 0], atol=1e-4)


def test_depth_of_an_ellipsoid_near_its_poles() -> None:
    p = points((29, 2, 3), (1, 21, 3), (1, 2, 8.1))
    np.testing.assert_allclose(ellipsoid(p, (1, 2, 3), (30, 20, 5)), [2, 1, -0.1], atol=0.12)


def test_superellipsoid_bulges_towards_the_corners() -> None:
    corner = points((7.5, 7.5, 0))
    assert ellipsoid(corner, (0, 0, 0), (10, 10, 10), 2.0)[0] < 0 < ellipsoid(corner, (0, 0, 0), (10, 10, 10), 3.0)[0]


def test_capsule_tapers_and_has_round_ends() -> None:
    p = points((0, 0, 0), (5, 1, 0), (12, 0, 0), (0, 0, 4))
    # Radius 3 at x = 0, 2 at x = 5, 1 at x = 10.
    np.testing.assert_allclose(capsule(p, (0, 0, 0), (10, 0, 0), 3, 1), [3, 1, -1, -1], atol=1e-5)


def test_smooth_max_is_the_maximum_far_from_equality_and_more_at_it() -> None:
    a = np.array([0.0, 5.0, 2.0], np.float32)
    b = np.array([9.0, -5.0, 2.0], np.float32)
    np.testing.assert_allclose(smooth_max(a, b, 4.0), [9, 5, 3])


def test_step_and_ramp() -> None:
    np.testing.assert_allclose(step(np.array([0.0, 2.0, 3.0, 4.0, 9.0]), 2, 4), [0, 0, 0.5, 1, 1])
    # A voxel of 2 mm whose centre lies 0.5 mm inside is three quarters inside.
    np.testing.assert_allclose(ramp(np.array([-1.0, 0.0, 0.5, 1.0, 5.0]), 2.0), [0, 0.5, 0.75, 1, 1])


def test_rotation_is_a_rotation() -> None:
    matrix = rotation(np.array([0.3, -0.7, 1.1]))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)
    # A quarter turn about the third axis takes the first axis to the second.
    np.testing.assert_allclose(rotation(np.array([0, 0, np.pi / 2])) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
