"""Drawing the tumours of a patient: how many, where, how large, and as hard for a box prompt as real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from medsam_lora.datasets.implicit import rotation
from medsam_lora.datasets.phantom_lattice import STEP_MM, Lattice, filled_box_dice, level_of_volume, oedema_arrival
from medsam_lora.datasets.phantom_tumour import Core, Lesion, before_push, labels_of, pathology_at
from medsam_lora.datasets.random_fields import random_field

FLOOR_RANGE: Final = (0.60, 0.79)
"""Dice of the filled box per slice that a drawn tumour must have.

On eight real glioma cases (BraTS 2018) it lies between 0.57 and 0.82; an ellipsoid would have 0.88.
"""

_ATTEMPTS = 24
_FLOOR_STEPS_MM = (1.8, 1.8, 0.8)
_FLOOR_PHASES = 3


@dataclass(frozen=True)
class Kind:
    """Ranges from which the lesions of a patient are drawn.

    Parameters
    ----------
    total_ml : tuple of float
        Volume of the whole tumour.
    core_share : tuple of float
        Of the core in it.
    rim_share : tuple of float
        Thickness of the enhancing rim over the radius of the core; 1 and more is a solid core.
    satellites : tuple of int
        Fewest and most further lesions.
    """

    total_ml: tuple[float, float]
    core_share: tuple[float, float]
    rim_share: tuple[float, float]
    satellites: tuple[int, int] = (0, 0)


KINDS: Final = (
    Kind((25, 75), (0.20, 0.50), (0.20, 0.40)),  # a ring with oedema
    Kind((3, 11), (0.25, 0.50), (0.50, 1.20)),  # small and mostly solid
    Kind((25, 65), (0.20, 0.45), (0.20, 0.50), (1, 2)),  # two or three lesions
    Kind((70, 145), (0.15, 0.45), (0.15, 0.30)),  # large
    Kind((20, 90), (0.30, 0.60), (0.00, 0.10)),  # hardly enhancing
)
"""Patients take these in turn, so that a small cohort already has every one."""


def grow(lattice: Lattice, generator: np.random.Generator, kind: Kind, growth: Sequence[float]) -> list[list[Lesion]]:
    """Draw the lesions of a patient at each of the patient's time points.

    Parameters
    ----------
    lattice : Lattice
    generator : numpy.random.Generator
    kind : Kind
    growth : sequence of float
        Factor on all volumes, one per time point.

    Returns
    -------
    list of list of Lesion
        One list per time point.

    Notes
    -----
    Shapes are drawn until the filled-box Dice of all time points lies in `FLOOR_RANGE`, so that a box prompt leaves
    as much to do as on real cases; where none of 24 draws does, the nearest is taken.
    """
    best: list[list[Lesion]] = []
    least = np.inf
    for _ in range(_ATTEMPTS):
        drafts = _draw(lattice, generator, kind)
        moments = [[draft.grown(lattice, factor) for draft in drafts] for factor in growth]
        floors = [floor for moment in moments for floor in _floors(moment, lattice)]
        miss = max(max(FLOOR_RANGE[0] - floor, floor - FLOOR_RANGE[1], 0.0) for floor in floors)
        if miss < least:
            best, least = moments, miss
        if miss == 0:
            break
    return best


@dataclass(frozen=True)
class _Draft:
    """A lesion before its size at a time point."""

    core: Core
    core_ml: float
    oedema_ml: float
    rim_share: float
    push_share: float
    roughness: np.ndarray

    def grown(self, lattice: Lattice, factor: float) -> Lesion:
        radius = _ball_radius_mm(self.core_ml * factor)
        tissue = lattice.tissue
        # A core keeps to its hemisphere and below the surface, and goes round fluid.
        beyond = np.maximum(1 - np.sign(self.core.centre[0]) * tissue.midline, 0)
        distance = self.core.distance(lattice.points, radius)
        distance += 3 * beyond + 2 * np.maximum(2.5 - tissue.head, 0) + 4 * tissue.csf
        level = level_of_volume(distance, self.core_ml * factor)
        start = distance < level
        arrival = oedema_arrival(lattice, start, self.roughness, radius)
        around = ~start & (tissue.csf < 0.5) & (tissue.head > 0.5)
        return Lesion(
            core=self.core,
            radius_mm=radius,
            push_mm=self.push_share * radius,
            level_mm=level,
            rim_mm=self.rim_share * radius,
            arrival=arrival,
            reach_mm=level_of_volume(arrival[around], self.oedema_ml * factor),
        )


def _draw(lattice: Lattice, generator: np.random.Generator, kind: Kind) -> list[_Draft]:
    total_ml = float(np.exp(generator.uniform(*np.log(kind.total_ml))))
    shares = [1.0]
    for _ in range(int(generator.integers(kind.satellites[0], kind.satellites[1] + 1))):
        shares.append(float(generator.uniform(0.12, 0.35)))
    drafts: list[_Draft] = []
    for share in shares:
        volume_ml = total_ml * share / sum(shares)
        core_ml = float(generator.uniform(*kind.core_share)) * volume_ml
        radius = _ball_radius_mm(core_ml)
        push = float(generator.uniform(0.08, 0.25))
        core = Core(
            centre=_site(lattice, generator, radius, [draft.core.centre for draft in drafts]),
            stretch=_stretch(generator),
            lobes=random_field(generator, float(np.clip(2.0 * radius, 12, 45))),
            knobs=random_field(generator, float(np.clip(0.8 * radius, 7, 14))),
        )
        drafts.append(
            _Draft(
                core=core,
                # The push swells a core by about this factor; the volume meant is the one after it.
                core_ml=core_ml / (1 + push) ** 2,
                oedema_ml=volume_ml - core_ml,
                rim_share=float(generator.uniform(*kind.rim_share)),
                push_share=push,
                roughness=0.65 * random_field(generator, 20.0).at(lattice.points),
            )
        )
    return drafts


def _floors(lesions: Sequence[Lesion], lattice: Lattice) -> list[float]:
    """Filled-box Dice of the whole tumour on grids of its own, whose slices of 2.4 mm lie at three offsets.

    Where two lesions share only a few slices, one slice more or less decides about much of the boxes' area.
    """
    reached = np.zeros(lattice.points.shape[1], bool)
    for lesion in lesions:
        reached |= lesion.arrival < lesion.reach_mm
    found = lattice.points[:, reached]
    pad = 2 * STEP_MM + sum(lesion.push_mm for lesion in lesions)
    ranges = [
        np.arange(low - pad, high + pad, step, dtype=np.float32)
        for low, high, step in zip(found.min(axis=1), found.max(axis=1), _FLOOR_STEPS_MM, strict=True)
    ]
    grid = np.meshgrid(*ranges, indexing="ij")
    source = before_push(lesions, np.stack([axis.ravel() for axis in grid]))
    labels = labels_of(pathology_at(lesions, lattice, source), lattice.sample(lattice.tissue.csf, source))
    # The skull strip cuts what the push leaves outside of the head.
    labels[lattice.sample(lattice.tissue.head, source) < 0] = 0
    tumour = labels.reshape(grid[0].shape) > 0
    return [filled_box_dice(tumour[:, :, phase::_FLOOR_PHASES]) for phase in range(_FLOOR_PHASES)]


def _site(
    lattice: Lattice, generator: np.random.Generator, radius_mm: float, others: Sequence[np.ndarray]
) -> np.ndarray:
    """A point of white matter of the cerebrum, deep enough for the core, not in another lesion."""
    tissue, points = lattice.tissue, lattice.points
    x, y, z = points
    white = tissue.white > 0.6
    good = white & (tissue.head > min(6 + 0.5 * radius_mm, 24)) & (np.abs(x) > 14 + 0.4 * radius_mm)
    good &= (z > -22 + 0.3 * radius_mm) & (z < 52) & (y > -66)
    # A further lesion lies close by, or so much higher or lower that few slices show both.
    close = bool(generator.integers(2))
    for other in others:
        away = np.sqrt(((points - other[:, None]) ** 2).sum(axis=0))
        good &= (away > 16 + radius_mm) & ((away < 32 + radius_mm) if close else (np.abs(z - other[2]) > 36))
    candidates = np.flatnonzero(good if good.any() else white)
    return points[:, generator.choice(candidates)].copy()


def _stretch(generator: np.random.Generator) -> np.ndarray:
    turn = rotation(generator.uniform(-np.pi, np.pi, 3))
    scale = np.exp(generator.normal(0, 0.28, 3))
    return (turn @ np.diag(scale / np.cbrt(scale.prod())) @ turn.T).astype(np.float32)


def _ball_radius_mm(volume_ml: float) -> float:
    return float(np.cbrt(volume_ml * 1000 * 3 / (4 * np.pi)))
