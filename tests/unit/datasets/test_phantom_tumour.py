"""How tumours grow: the front against Dijkstra, mass effect, labels and floors by hand."""

from __future__ import annotations

import heapq
from itertools import product

import numpy as np
import pytest

from medsam_lora.datasets.phantom_anatomy import HEAD_RADII_MM, draw_anatomy
from medsam_lora.datasets.phantom_growth import FLOOR_RANGE, KINDS, grow
from medsam_lora.datasets.phantom_lattice import (
    STEP_MM,
    Lattice,
    arrival_times,
    brain_lattice,
    filled_box_dice,
    level_of_volume,
)
from medsam_lora.datasets.phantom_tumour import Core, Lesion, Pathology, before_push, labels_of, pathology_at
from medsam_lora.datasets.random_fields import RandomField


@pytest.fixture(scope="module")
def lattice() -> Lattice:
    return brain_lattice(draw_anatomy(np.random.default_rng(0)))


def dijkstra(start: np.ndarray, slowness: np.ndarray, step: float) -> np.ndarray:
    times = np.full(start.shape, np.inf)
    queue = []
    for place in zip(*np.nonzero(start), strict=True):
        times[place] = 0
        heapq.heappush(queue, (0.0, place))
    while queue:
        time, place = heapq.heappop(queue)
        if time > times[place]:
            continue
        for offset in product((-1, 0, 1), repeat=3):
            other = tuple(int(p) + o for p, o in zip(place, offset, strict=True))
            length = np.sqrt(sum(abs(o) for o in offset))
            if not 0 < length < 1.5 or any(not 0 <= p < n for p, n in zip(other, start.shape, strict=True)):
                continue
            reached = time + step * length * (slowness[place] + slowness[other]) / 2
            if reached < times[other] - 1e-12:
                times[other] = reached
                heapq.heappush(queue, (reached, other))
    return times


def test_arrival_times_are_shortest_paths() -> None:
    generator = np.random.default_rng(0)
    slowness = generator.uniform(0.5, 9, (7, 6, 5)).astype(np.float32)
    start = np.zeros(slowness.shape, bool)
    start[1, 2, 3] = start[6, 5, 0] = True
    np.testing.assert_allclose(
        arrival_times(start, slowness, 2.5), dijkstra(start, slowness.astype(np.float64), 2.5), rtol=1e-5
    )


def test_the_front_goes_round_a_wall() -> None:
    slowness = np.ones((5, 5, 1), np.float32)
    slowness[2, :4] = 1000
    start = np.zeros(slowness.shape, bool)
    start[0, 0, 0] = True
    times = arrival_times(start, slowness, 1.0)
    # Round the end of the wall at column 4: no path through the wall is under 1000.
    assert times[4, 0, 0] < 12
    assert times[4, 0, 0] > 4 + 4 * (np.sqrt(2) - 1)


def test_level_of_volume_counts_lattice_points() -> None:
    values = np.random.default_rng(0).permutation(1000).astype(float)
    level = level_of_volume(values, 100 * STEP_MM**3 / 1000)
    assert (values < level).sum() == 100


def test_filled_box_dice_of_a_disc_and_of_two_slices() -> None:
    grid = np.indices((401, 401)) - 200
    disc = (grid**2).sum(axis=0) < 200**2
    # An ellipse fills pi/4 of its box.
    assert filled_box_dice(disc[:, :, None]) == pytest.approx(2 * (np.pi / 4) / (1 + np.pi / 4), abs=0.005)
    two = np.zeros((4, 4, 2), bool)
    two[0, 0, 0] = two[3, 3, 0] = True  # 2 of 16
    two[1:3, 1:3, 1] = True  # 4 of 4
    assert filled_box_dice(two) == pytest.approx(2 * 6 / (6 + 20))
    assert filled_box_dice(np.zeros((2, 2, 2), bool)) == 1.0


def ball(push_mm: float, centre: tuple[float, float, float] = (20.0, 0.0, 10.0)) -> Lesion:
    none = RandomField(np.zeros((4, 4, 4), np.float32), 10.0)
    core = Core(np.array(centre, np.float32), np.eye(3, dtype=np.float32), none, none)
    return Lesion(core, 12.0, push_mm, 0.0, 3.0, np.zeros(1, np.float32), 0.0)


def test_mass_effect_pushes_outwards_without_folding() -> None:
    lesion = ball(3.0)
    away = np.arange(0, 40, 0.5, dtype=np.float32)
    line = lesion.core.centre[:, None] + np.stack([0 * away, away, 0 * away])
    source = before_push([lesion], line)
    came_from = source[1] - lesion.core.centre[1]
    assert came_from[0] == 0
    assert (came_from <= away).all()
    # Neighbours stay in order, or tissue would be there twice.
    assert (np.diff(came_from) > 0).all()
    push = away - came_from
    assert push.max() == pytest.approx(3.0, abs=0.6)
    assert 8 < away[push.argmax()] < 24


def test_mass_effect_ends_at_the_skull() -> None:
    rim = np.array([[0, 0, HEAD_RADII_MM[2] * 0.95], [HEAD_RADII_MM[0] * 0.97, 0, 0]], np.float32).T
    np.testing.assert_array_equal(before_push([ball(5.0)], rim), rim)
    assert before_push([], rim) is rim


def test_labels_by_hand() -> None:
    pathology = Pathology(
        core=np.array([-1.0, -1.0, -1.0, 1.0, 4.0, 1.0], np.float32),
        rim=np.array([0.0, 0.0, 0.0, 3.0, 3.0, -1.0], np.float32),
        oedema=np.array([-1.0, 2.0, 2.0, 9.0, 9.0, 9.0], np.float32),
    )
    csf = np.array([0.0, 0.0, 0.9, 0.9, 0.0, 0.0], np.float32)
    # Outside; oedema; fluid in oedema; rim; within the rim; a core whose rim is broken there.
    assert labels_of(pathology, csf).tolist() == [0, 2, 0, 3, 1, 1]


def test_a_core_has_the_volume_and_place_asked_for(lattice: Lattice) -> None:
    lesions = grow(lattice, np.random.default_rng(3), KINDS[0], [1.0])[0]
    assert len(lesions) == 1
    pathology = pathology_at(lesions, lattice, lattice.points)
    core, tumour = pathology.core > 0, (pathology.oedema > 0) | (pathology.core > 0)
    total_ml = tumour.sum() * STEP_MM**3 / 1000
    assert 0.7 * KINDS[0].total_ml[0] < total_ml < 1.1 * KINDS[0].total_ml[1]
    assert core.sum() < 0.6 * tumour.sum()
    # The core keeps to one hemisphere.
    sides = np.sign(lattice.points[0, core & (np.abs(lattice.points[0]) > 6)])
    assert abs(float(sides.mean())) > 0.97


def test_oedema_prefers_white_matter(lattice: Lattice) -> None:
    lesion = grow(lattice, np.random.default_rng(3), KINDS[3], [1.0])[0][0]
    near = (lesion.core.distance(lattice.points, lesion.radius_mm) < 20) & (lattice.tissue.head > 1)
    outside = near & (lesion.arrival > 0)
    share = {
        name: float((lesion.arrival < lesion.reach_mm)[outside & (getattr(lattice.tissue, name) > 0.8)].mean())
        for name in ("white", "grey", "csf")
    }
    assert share["white"] > 1.4 * share["grey"] > 2 * share["csf"]


def test_satellites_and_growth(lattice: Lattice) -> None:
    early, late = grow(lattice, np.random.default_rng(1), KINDS[2], [1.0, 1.5])
    assert len(early) == len(late) >= 2
    for first, second in zip(early, late, strict=True):
        assert np.array_equal(first.core.centre, second.core.centre)
        assert second.radius_mm == pytest.approx(first.radius_mm * np.cbrt(1.5))
    volumes = [
        ((pathology_at(m, lattice, lattice.points).oedema > 0) & (lattice.tissue.csf < 0.5)).sum()
        for m in (early, late)
    ]
    assert volumes[1] / volumes[0] == pytest.approx(1.5, abs=0.15)


def test_the_floor_asked_for_is_inside_that_of_real_cases() -> None:
    assert 0.57 < FLOOR_RANGE[0] < FLOOR_RANGE[1] < 0.82
