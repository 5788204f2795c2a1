"""A brain from formulae: hemispheres, folds, ventricles, deep grey matter, cerebellum and brainstem.

All of it is defined in the head frame: millimetres from a point near the mid-commissural point, axes R, A, S, so
that it looks the same on every grid. Surfaces are implicit (`datasets.implicit`): a depth is a signed distance in
mm, positive inside. Sizes follow the atlas space of BraTS (SRI24), where a brain measures about 138 x 172 x 143 mm.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from medsam_lora.datasets.implicit import capsule, ellipsoid, ramp, rotation, smooth_max, step
from medsam_lora.datasets.random_fields import RandomField, random_field

HEAD_RADII_MM = (75.0, 94.0, 77.0)
"""Half axes of an ellipsoid about the head frame's origin that holds every brain."""

_FOLD_CENTRE = np.array([0.0, -4.0, 2.0], np.float32)
_FOLD_RADII = np.array([66.0, 84.0, 64.0], np.float32)


@dataclass(frozen=True)
class Anatomy:
    """The random choices that make one head different from another.

    Parameters
    ----------
    to_template : ndarray of float32, shape (3, 3)
        Rotation and scaling from head to template mm.
    warp : tuple of RandomField
        Smooth displacement along the three axes.
    folds, fold_slopes : RandomField
        Sulci lie where `folds` is zero; the slope turns its value into mm.
    depths, textures : RandomField
        Modulate the depth and width of sulci and the thickness of cortex.
    ventricle_size : float
        Factor on the radius of the ventricles.
    sulcus_mm : float
        Half width of a sulcus at the surface: the atrophy of the brain.
    """

    to_template: np.ndarray
    warp: tuple[RandomField, RandomField, RandomField]
    folds: RandomField
    fold_slopes: RandomField
    depths: RandomField
    textures: RandomField
    ventricle_size: float
    sulcus_mm: float


@dataclass(frozen=True)
class Tissue:
    """What is at each point, flat arrays of float32, shape (N,).

    Parameters
    ----------
    head : ndarray
        Depth below the surface of the skull-stripped head, mm.
    csf, grey, white : ndarray
        Fractions of a voxel, sum 1.
    surface : ndarray
        Distance to the nearest fluid outside the ventricles, mm, negative in it.
    midline : ndarray
        Signed distance to the interhemispheric plane, mm, positive to the right.
    """

    head: np.ndarray
    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    surface: np.ndarray
    midline: np.ndarray

    def at(self, keep: np.ndarray) -> Tissue:
        """The tissue of some of the points."""
        return Tissue(*(getattr(self, field.name)[keep] for field in fields(self)))


def draw_anatomy(generator: np.random.Generator) -> Anatomy:
    """Draw a head."""
    angles = np.deg2rad(generator.normal(0, 2.0, 3))
    scale = generator.normal(0.98, 0.02) * generator.normal(1.0, 0.015, 3)
    folds = random_field(generator, 19.0, 0.2)
    return Anatomy(
        to_template=(rotation(angles) / np.clip(scale, 0.92, 1.04)).astype(np.float32),
        warp=tuple(random_field(generator, 75.0) for _ in range(3)),  # type: ignore[arg-type]
        folds=folds,
        fold_slopes=folds.gradient_size(),
        depths=random_field(generator, 26.0),
        textures=random_field(generator, 11.0),
        ventricle_size=float(generator.uniform(0.75, 1.45)),
        sulcus_mm=float(generator.uniform(0.5, 1.15)),
    )


def tissue_at(anatomy: Anatomy, points: np.ndarray, voxel_mm: float = 1.0) -> Tissue:
    """Tissue at points of the head frame.

    Parameters
    ----------
    anatomy : Anatomy
    points : ndarray of float32, shape (3, N)
        Head frame, mm.
    voxel_mm : float
        Width of the ramp between tissues: the partial volume of a voxel of that size.
    """
    p = anatomy.to_template @ points
    p += np.stack([2.0 * field.at(points) for field in anatomy.warp])
    x, y, z = p
    side = np.abs(x)
    cerebrum = _cerebrum(side, y, z)
    cerebellum = _cerebellum(side, y, z)
    stem = _stem(side, y, z)
    wobble = anatomy.depths.at(p)
    texture = anatomy.textures.at(p)
    cistern = ellipsoid((side, y, z), (0, 0, -17), (24, 30, 9))
    hull = smooth_max(smooth_max(cerebrum, cerebellum, 9.0), np.maximum(stem, cistern), 7.0)
    head = hull + 0.6 + anatomy.sulcus_mm * 0.6 + 0.5 * texture

    fissure = _fissure(side, y, z, 0.5 + 0.5 * anatomy.sulcus_mm)
    sylvian = _sylvian(side, y, z + 2.0 * wobble, 0.4 + 0.7 * anatomy.sulcus_mm)
    # The medial wall has sulci of its own, shallower ones, but not where the hemispheres are joined.
    medial = 1.5 * np.maximum(fissure, 0) + 30 * step(_joined(y, z), -5, 2)
    outer = np.minimum(cerebrum, medial)
    sulci = _sulci(anatomy, p, outer, wobble)
    surface = np.minimum(np.minimum(cerebrum, fissure), np.minimum(sylvian, sulci))
    ventricles = _ventricles(side, y, z, anatomy.ventricle_size)

    cortex = ramp(3.0 + 0.5 * texture - surface, voxel_mm)
    grey = np.maximum(cortex, _deep_grey(side, y, z, voxel_mm))
    fluid = ramp(-surface, voxel_mm)
    # The stem joins the cerebrum from below; the cerebellum stands free behind the tentorium.
    folia_grey, folia_fluid = _folia(side, y, z, cerebellum, wobble, voxel_mm)
    behind = ramp(cerebellum - np.maximum(cerebrum, stem), voxel_mm)
    in_stem = ramp(stem, voxel_mm)
    grey = grey + in_stem * (0.3 - grey)
    fluid = fluid * (1 - in_stem)
    grey = grey + behind * (folia_grey - grey)
    fluid = fluid + behind * (folia_fluid - fluid)
    fluid = np.maximum(fluid, ramp(ventricles, voxel_mm))
    grey = np.clip(grey, 0, 1) * (1 - fluid)
    return Tissue(head, fluid, grey, 1 - fluid - grey, np.where(behind > 0.5, cerebellum, surface), x)


def _cerebrum(side: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # Widest behind the middle, narrower at the frontal pole.
    taper = 1 - 0.11 * step(y, -15, 80) - 0.03 * step(-y, 30, 80)
    dome = ellipsoid((side / taper, y, z), (0, -3, 6), (66.5, 84.5, 63), 2.4)
    frontal, occipital = step(y, 6, 30), step(-y, 18, 40)
    tentorium = -19 + 16 * np.exp(-((side / 22) ** 2))
    floor = -13 + frontal * -6 + occipital * (tentorium + 13)
    upper = -smooth_max(-dome, floor - z, 5.0)
    temporal = ellipsoid((side, y, z + 0.12 * y), (42, 2, -21), (24.5, 44, 22))
    return smooth_max(upper, temporal, 5.0)


def _cerebellum(side: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    lobes = ellipsoid((side, y, z + 0.12 * (y + 55)), (21, -51, -35), (30, 28, 21.5))
    vermis = ellipsoid((side, y, z), (0, -47, -29), (11, 24, 22))
    return smooth_max(lobes, vermis, 3.0)


def _stem(side: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    cord = capsule((side, y, z), (0, -16, -2), (0, -32, -72), 13.5, 9.0)
    pons = ellipsoid((side, y, z), (0, -14, -30), (17, 13.5, 15))
    peduncles = ellipsoid((side, y, z), (9, -9, -12), (10, 14, 12))
    return smooth_max(smooth_max(cord, pons, 6.0), peduncles, 4.0)


def _fissure(side: np.ndarray, y: np.ndarray, z: np.ndarray, half_width_mm: float) -> np.ndarray:
    joined = np.maximum(_joined(y, z), 0)
    return np.sqrt(side**2 + joined**2) - half_width_mm * (1 + 0.02 * np.maximum(z, 0))


def _joined(y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # Depth inside the ellipse that the corpus callosum bounds, where no fissure parts the hemispheres.
    return ellipsoid((np.zeros_like(y), y, z), (0, -1, 0), (1e6, 39, 28))


def _sylvian(side: np.ndarray, y: np.ndarray, z: np.ndarray, half_width_mm: float) -> np.ndarray:
    above = (z - (-3 - 0.45 * y)) * 0.91
    lateral = np.sqrt(above**2 + np.maximum(np.abs(y - 1) - 35, 0) ** 2 + np.maximum(37 - side, 0) ** 2)
    insula = np.sqrt(
        (side - 38 + 0.003 * (y - 5) ** 2) ** 2
        + np.maximum(np.abs(above - 2) - 9, 0) ** 2
        + np.maximum(np.abs(y - 4) - 19, 0) ** 2
    )
    return np.minimum(lateral, insula) - half_width_mm


def _sulci(anatomy: Anatomy, p: np.ndarray, outer: np.ndarray, wobble: np.ndarray) -> np.ndarray:
    """Distance to the nearest sulcus: sheets that stand on the surface, `outer` mm below it, and end at a depth."""
    relative = (p - _FOLD_CENTRE[:, None]) / _FOLD_RADII[:, None]
    radius = np.maximum(np.sqrt((relative**2).sum(axis=0)), 0.35)
    # All points on one ray share a fold, so that sheets run perpendicular to the surface.
    on_surface = _FOLD_CENTRE[:, None] + relative / radius * _FOLD_RADII[:, None]
    # The sheets bend on their way down.
    bend = anatomy.depths.at(p[[1, 2, 0]])
    on_surface += 0.15 * outer * np.stack([bend, -wobble, bend + wobble])
    slope = np.maximum(anatomy.fold_slopes.at(on_surface), 0.10)
    sheet = np.abs(anatomy.folds.at(on_surface)) / slope * radius
    end = np.clip(14 + 7 * wobble, 3, 26) * step(radius, 0.40, 0.75)
    width = anatomy.sulcus_mm * np.clip(1.15 - outer / (end + 1), 0.2, 1.0) * (1 + 0.25 * wobble)
    return np.sqrt(sheet**2 + np.maximum(outer - end, 0) ** 2) - width


def _ventricles(side: np.ndarray, y: np.ndarray, z: np.ndarray, size: float) -> np.ndarray:
    p = (side, y, z)
    bones = (
        ((13.0, 34.0, 3.0), (5.5, 10.0, 12.0), 3.4, 4.4),
        ((7.0, 14.0, 15.0), (12.0, -20.0, 19.0), 4.6, 5.0),
        ((12.0, -20.0, 19.0), (24.0, -42.0, 8.0), 5.0, 6.4),
        ((24.0, -42.0, 8.0), (22.0, -64.0, 5.0), 5.4, 1.2),
        ((25.0, -40.0, 5.0), (32.0, -8.0, -17.0), 3.8, 1.6),
    )
    depth = np.full_like(side, -1e3)
    for start, end, first, last in bones:
        depth = smooth_max(depth, capsule(p, start, end, first * size, last * size), 1.5)
    # The septum keeps the two sides apart.
    depth = np.minimum(depth, side - 0.8)
    third = ellipsoid(p, (0, -4, -1), (1.4 + 1.3 * size, 12, 9))
    fourth = ellipsoid(p, (0, -37, -33), (7, 4.5, 9))
    quadrigeminal = ellipsoid(p, (0, -40, -2), (10, 5, 6))
    return np.maximum(np.maximum(depth, third), np.maximum(fourth, quadrigeminal))


def _deep_grey(side: np.ndarray, y: np.ndarray, z: np.ndarray, voxel_mm: float) -> np.ndarray:
    p = (side, y, z)
    nuclei = (
        (0.70, (10.5, -12.0, 7.0), (8.5, 14.0, 8.5)),  # thalamus
        (0.95, (15.5, 18.0, 9.0), (4.5, 10.0, 8.0)),  # head of the caudate
        (0.95, (28.0, 4.0, 2.0), (5.0, 16.0, 9.5)),  # putamen
        (0.45, (21.0, 0.0, 0.0), (5.0, 9.5, 6.5)),  # pallidum
    )
    grey = np.zeros_like(side)
    for share, centre, radii in nuclei:
        grey = np.maximum(grey, share * ramp(ellipsoid(p, centre, radii), voxel_mm + 1.0))
    return grey


def _folia(
    side: np.ndarray, y: np.ndarray, z: np.ndarray, depth: np.ndarray, wobble: np.ndarray, voxel_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Grey and fluid shares of the cerebellum: leaves that fan out from the fourth ventricle."""
    angle = np.arctan2(z + 34, -(y + 33)) + 0.006 * side
    leaf = np.sin(26 * angle + 1.2 * wobble)
    core = ramp(depth - 9 - 3.0 * leaf, voxel_mm + 1.0)
    fluid = np.clip(ramp(-depth, voxel_mm) + 0.5 * step(leaf, 0.55, 0.95) * step(-depth, -8, -1), 0, 1)
    return 1 - core, fluid
