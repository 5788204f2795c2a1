"""The nearest lattice points, against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from medsam_lora.metrics.nearest import nearest


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0), (0.7, 0.7, 5.0), (9.0, 0.1, 1.0)])
@pytest.mark.parametrize("span", [4, 12, 60])
def test_equal_to_all_pairs(spacing: tuple[float, float, float], span: int):
    # Near together every point is found by looking around it, far apart by the tree.
    rng = np.random.default_rng(span)
    points, others = (np.unique(rng.integers(-span, span, (60, 3)), axis=0) for _ in range(2))
    found = nearest(points, others, spacing)
    table = np.sqrt((((points[:, None] - others) * np.array(spacing)) ** 2).sum(axis=2))
    assert found.distances == pytest.approx(table.min(axis=1), rel=1e-15)
    assert table[np.arange(len(points)), found.which].tolist() == found.distances.tolist()


def test_equal_distances_are_equal_to_the_last_bit():
    # Three steps of 0.1 mm are 0.30000000000000004 mm as a product, however they are found.
    points = np.array([[0, 0, 0], [50, 0, 0]])
    around = nearest(points, points + np.array([3, 0, 0]), (0.1, 1.0, 1.0)).distances
    by_tree = nearest(points, points + np.array([0, 30, 0]), (1.0, 0.1, 1.0)).distances
    assert around.tolist() == [3 * 0.1] * 2
    assert by_tree.tolist() == [30 * 0.1] * 2


def test_without_others():
    points, none = np.zeros((2, 3), np.int64), np.zeros((0, 3), np.int64)
    assert nearest(points, none, (1.0, 1.0, 1.0)).distances.tolist() == [np.inf] * 2
    assert nearest(none, points, (1.0, 1.0, 1.0)).distances.shape == (0,)
