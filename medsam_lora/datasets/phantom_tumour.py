"""Tumours of the phantom: a lobulated core with necrosis and an enhancing rim, in oedema with fingers.

The core is a level set of a distorted, noisy ellipsoid; oedema is what the front of `phantom_growth` reaches. Both
are computed in the head frame, so that a patient's tumour is the same on every grid. Mass effect then pushes
anatomy and tumour outwards together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam_lora.datasets.phantom_anatomy import HEAD_RADII_MM
from medsam_lora.datasets.phantom_lattice import Lattice
from medsam_lora.datasets.random_fields import RandomField
from medsam_lora.labels import ET, NETC, SNFH


@dataclass(frozen=True)
class Core:
    """The shape of a core: an ellipsoid with lobes.

    Parameters
    ----------
    centre : ndarray of float32, shape (3,)
        Head frame, mm.
    stretch : ndarray of float32, shape (3, 3)
        Of determinant 1.
    lobes, knobs : RandomField
        Coarse and fine irregularity.
    """

    centre: np.ndarray
    stretch: np.ndarray
    lobes: RandomField
    knobs: RandomField

    def distance(self, points: np.ndarray, radius_mm: float) -> np.ndarray:
        """Level-set function of a core of about that radius, mm, negative inside, shape (3, N) to (N,)."""
        away = np.sqrt(((self.stretch @ (points - self.centre[:, None])) ** 2).sum(axis=0))
        depth = np.float32(radius_mm) - away
        # Far from the core the irregularity fades, or it would raise islands there.
        fade = np.clip(2.5 - away / np.float32(radius_mm), 0, 1)
        near = np.flatnonzero(fade)
        places = points[:, near]
        irregular = 0.34 * self.lobes.at(places) + 0.15 * self.knobs.at(places)
        depth[near] += np.float32(radius_mm) * irregular * fade[near]
        return -depth


@dataclass(frozen=True)
class Lesion:
    """One lesion at one time, as functions of the head frame before mass effect.

    Parameters
    ----------
    core : Core
    radius_mm : float
        Of a ball as large as the core.
    push_mm : float
        Largest displacement of the tissue round it.
    level_mm : float
        Value of `Core.distance` at the core's surface.
    rim_mm : float
        Mean thickness of the enhancing rim.
    arrival : ndarray of float32, shape (N,)
        Arrival time of oedema on the lattice, in mm of white matter.
    reach_mm : float
        Arrival time at its outer border.
    """

    core: Core
    radius_mm: float
    push_mm: float
    level_mm: float
    rim_mm: float
    arrival: np.ndarray
    reach_mm: float


@dataclass(frozen=True)
class Pathology:
    """What tumours are at each point, flat arrays of float32, shape (N,).

    Parameters
    ----------
    core : ndarray
        Depth in the core, mm, negative outside.
    rim : ndarray
        Thickness of the enhancing rim there, mm; none where negative.
    oedema : ndarray
        Depth in oedema and core together, in mm of white matter.
    """

    core: np.ndarray
    rim: np.ndarray
    oedema: np.ndarray


def pathology_at(lesions: Sequence[Lesion], lattice: Lattice, points: np.ndarray) -> Pathology:
    """Tumours at points of the head frame before mass effect (see `before_push`), shape (3, N)."""
    core = np.full(points.shape[1], -1e3, np.float32)
    rim, oedema = np.zeros_like(core), core.copy()
    for lesion in lesions:
        depth = lesion.level_mm - lesion.core.distance(points, lesion.radius_mm)
        # Somewhat beyond the core too, for what shades off across its border.
        inner = np.flatnonzero((depth > core) & (depth > -5))
        rim[inner] = lesion.rim_mm * (1 + 0.6 * lesion.core.knobs.at(points[[1, 2, 0]][:, inner]))
        core = np.maximum(core, depth)
        oedema = np.maximum(oedema, lesion.reach_mm - lattice.sample(lesion.arrival, points))
    return Pathology(core, rim, oedema)


def labels_of(pathology: Pathology, csf: np.ndarray) -> np.ndarray:
    """Canonical labels of points, shape (N,) uint8; fluid is never oedema."""
    labels = np.zeros(pathology.core.shape, np.uint8)
    labels[(pathology.oedema > 0) & (csf < 0.5)] = SNFH
    labels[pathology.core > 0] = NETC
    labels[(pathology.core > 0) & (pathology.core < pathology.rim)] = ET
    return labels


def before_push(lesions: Sequence[Lesion], points: np.ndarray) -> np.ndarray:
    """Where the tissue at each point came from before the lesions pushed it, shape (3, N) to (3, N).

    The push is 0 at a lesion's centre, greatest near its border, falls off slowly, and is 0 at the skull.
    """
    if not lesions:
        return points
    moved = points.copy()
    norm = np.sqrt(sum((points[axis] / np.float32(radius)) ** 2 for axis, radius in enumerate(HEAD_RADII_MM)))
    give = np.clip((np.float32(0.94) - norm) / np.float32(0.3), 0, 1)
    for lesion in lesions:
        reach_mm = np.float32(1.3 * lesion.radius_mm)
        relative = (points - lesion.core.centre[:, None]) / reach_mm
        moved -= relative * (np.float32(2 * lesion.push_mm) * give / (1 + (relative**2).sum(axis=0)))
    return moved
