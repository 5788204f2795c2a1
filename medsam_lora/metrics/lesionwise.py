"""Lesion-wise Dice and HD95 of the BraTS 2023 challenges: every lesion counts alike, whatever its size.

The lesions are the connected parts of the reference after a dilation, so that near parts are one lesion. A component
of the prediction belongs to every lesion whose own dilation it touches; it is compared whole with each, and is a
false positive where it belongs to none, however small it is. A lesion that nothing belongs to scores 0 and 374 mm,
and so does every false positive; the score of a case is the mean. Lesions up to a volume do not count, found or
missed, but what belongs to them is no false positive either.

The numbers are those of the challenge's evaluation [1]_, which later years changed: they carry its name.

References
----------
.. [1] R. Saluja et al., BraTS 2023 performance metrics, https://github.com/rachitsaluja/BraTS-2023-Metrics, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import ndimage

from medsam_lora.metrics import WORST_DISTANCE_MM
from medsam_lora.metrics.boxes import BLOCK, Box, around, islands
from medsam_lora.metrics.overlap import count
from medsam_lora.metrics.surface import SurfacePair, robust_hausdorff, surface_pair

_TOUCHING = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Challenge:
    """The parameters of a challenge.

    Parameters
    ----------
    dilation_steps : int
        Times that a voxel grows to its 18 neighbours, where lesions merge and where a prediction touches one; at most
        three, as lesions are looked for in parts of a volume that are `boxes.BLOCK` voxels apart.
    ignored_volume_mm3 : float
        Lesions of up to this volume do not count.
    """

    dilation_steps: int
    ignored_volume_mm3: float

    def __post_init__(self) -> None:
        if 2 * self.dilation_steps > BLOCK - 1:
            raise ValueError(f"dilation_steps is {self.dilation_steps}: lesions {BLOCK} voxels apart would be one")


CHALLENGES: Final[Mapping[str, Challenge]] = {
    "brats2023-gli": Challenge(3, 50.0),
    "brats2023-men": Challenge(1, 50.0),
    "brats2023-met": Challenge(1, 2.0),
    "brats2023-ssa": Challenge(3, 50.0),
    "brats2023-ped": Challenge(3, 50.0),
}
"""Every challenge by the name that results carry: glioma, meningioma, metastases, Sub-Saharan Africa, paediatric."""


@dataclass(frozen=True)
class LesionScores:
    """Scores of one region over its lesions.

    Parameters
    ----------
    dice, hd95_mm : float
        Means over the counted lesions and the false positives; 1 and 0 where there is neither.
    tp, fn : int
        Counted lesions that a component of the prediction belongs to, and those that none does.
    fp : int
        Components of the prediction that belong to no lesion.
    """

    dice: float
    hd95_mm: float
    tp: int
    fp: int
    fn: int


def lesionwise(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float],
    challenge: Challenge,
    surfaces: SurfacePair | None = None,
) -> LesionScores:
    """Score a region lesion by lesion.

    Parameters
    ----------
    reference, prediction : ndarray of bool, shape (X, Y, Z)
    spacing_mm : sequence of float, length 3
        Distance of voxel centres along each array axis.
    challenge : Challenge
        An entry of `CHALLENGES`.
    surfaces : SurfacePair, optional
        Those of the two masks, where they have been measured already.

    Returns
    -------
    LesionScores

    Examples
    --------
    >>> reference = np.zeros((20, 9, 9), bool)
    >>> reference[1:5, 2:6, 2:6] = True
    >>> prediction = reference.copy()
    >>> prediction[15, 4, 4] = True
    >>> lesionwise(reference, prediction, (1.0, 1.0, 1.0), CHALLENGES["brats2023-men"])
    LesionScores(dice=0.5, hd95_mm=187.0, tp=1, fp=1, fn=0)
    """
    # Parts of both masks that no dilation joins are dealt with one by one; the air between them has no part in any
    # number.
    steps = challenge.dilation_steps
    parts = islands(reference | prediction)
    lesions, lesion_boxes = _numbered(reference, parts, lambda mask: merged_lesions(mask, steps))
    components, component_boxes = _numbered(prediction, parts, lambda mask: ndimage.label(mask, _TOUCHING)[0])
    n_components = len(component_boxes)
    # The file format has float32 spacings, so that 50 voxels of 1.00000001 mm are no more than 50 mm³.
    voxel_mm3 = float(np.prod(np.asarray(spacing_mm, np.float32).astype(np.float64)))
    matches: list[tuple[int, list[int]]] = []
    belonging: set[int] = set()
    dices: list[float] = []
    for number, own in enumerate(lesion_boxes, start=1):
        mine = _touching(lesions, number, own, components, steps)
        belonging.update(mine)
        volume = np.count_nonzero(lesions[own] == number) * voxel_mm3
        if volume <= challenge.ignored_volume_mm3:
            continue
        matches.append((number, mine))
        if not mine:
            dices.append(0.0)
            continue
        both = around([own, *(component_boxes[i - 1] for i in mine)])
        dices.append(_dice(lesions[both] == number, np.isin(components[both], mine)))
    fp, tp = n_components - len(belonging), sum(bool(mine) for _, mine in matches)
    n = len(dices) + fp
    if not n:
        return LesionScores(1.0, 0.0, 0, 0, 0)
    if tp and surfaces is None:
        surfaces = surface_pair(reference, prediction, spacing_mm)
    distances = _distances(matches, lesions, components, surfaces)
    return LesionScores(sum(dices) / n, (sum(distances) + WORST_DISTANCE_MM * fp) / n, tp, fp, len(dices) - tp)


def _distances(
    matches: Sequence[tuple[int, list[int]]],
    lesions: np.ndarray,
    components: np.ndarray,
    surfaces: SurfacePair | None,
) -> list[float]:
    """HD95 of every lesion that counts against the components that belong to it."""
    if surfaces is None:  # nothing was found
        return [WORST_DISTANCE_MM for _ in matches]
    lesion_of = _numbers_at(surfaces.reference.points, lesions)
    component_of = _numbers_at(surfaces.prediction.points, components)
    return [
        robust_hausdorff(surfaces.between(lesion_of == number, np.isin(component_of, mine)))
        if mine
        else WORST_DISTANCE_MM
        for number, mine in matches
    ]


def _numbered(
    mask: np.ndarray, parts: Sequence[Box], number: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, list[Box]]:
    """Numbers of lesions or components, counted on through the parts of a volume, and the box of each."""
    # Untouched zeros cost nothing: the system gives out their pages when they are written to.
    numbers = np.zeros(mask.shape, np.int32)
    boxes: list[Box] = []
    for part in parts:
        own = number(mask[part])
        found = [
            tuple(slice(s.start + p.start, s.stop + p.start) for s, p in zip(box, part, strict=True))
            for box in ndimage.find_objects(own)
        ]
        own[own > 0] += len(boxes)
        numbers[part] = own
        boxes += found
    return numbers, boxes


def _numbers_at(points: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of which lesion or component a surface element is: that of any voxel set around its lattice point."""
    x, y, z = numbers.shape
    flat, found = numbers.ravel(), np.zeros(len(points), np.int32)
    for corner in np.ndindex(2, 2, 2):
        i, j, k = (points - np.array(corner)).T
        inside = (i >= 0) & (i < x) & (j >= 0) & (j < y) & (k >= 0) & (k < z)
        # Of one number only, as lesions and components do not touch one another by a corner.
        np.maximum(found, np.where(inside, flat[np.where(inside, (i * y + j) * z + k, 0)], 0), out=found)
    return found


def merged_lesions(reference: np.ndarray, steps: int) -> np.ndarray:
    """Number the lesions of a mask: voxels are of one lesion where their dilations touch, by a corner at least.

    Parameters
    ----------
    reference : ndarray of bool, shape (X, Y, Z)
    steps : int
        Of the dilation. What it loses at the border of the array does not change the lesions.

    Returns
    -------
    ndarray of int32, shape (X, Y, Z)
        From 1, and 0 where `reference` is not set.
    """
    lesions, _ = ndimage.label(dilated(reference, steps), _TOUCHING)
    lesions[~reference] = 0
    return lesions


def dilated(mask: np.ndarray, steps: int) -> np.ndarray:
    """Grow a mask to the 18 neighbours of its voxels (those that share a face or an edge), `steps` times.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)
    steps : int

    Examples
    --------
    >>> mask = np.zeros((5, 5, 5), bool)
    >>> mask[2, 2, 2] = True
    >>> int(dilated(mask, 1).sum()), int(dilated(mask, 2).sum())
    (19, 93)
    """
    for _ in range(steps):
        # The 18 neighbours are the squares of 3 x 3 in the three planes; a square is one line along another. Whole
        # arrays shifted against each other take a tenth of the time of scipy's walk from voxel to voxel.
        along_x, along_y = _line(mask, 0), _line(mask, 1)
        mask = _line(along_x, 1) | _line(along_x, 2) | _line(along_y, 2)
    return mask


def _line(mask: np.ndarray, axis: int) -> np.ndarray:
    grown = mask.copy()
    later: tuple[slice, ...] = (*[slice(None)] * axis, slice(1, None))
    earlier: tuple[slice, ...] = (*[slice(None)] * axis, slice(None, -1))
    grown[later] |= mask[earlier]
    grown[earlier] |= mask[later]
    return grown


def _touching(lesions: np.ndarray, number: int, box: Box, components: np.ndarray, steps: int) -> list[int]:
    """Numbers of the components within the dilation of one lesion."""
    wide = tuple(slice(max(s.start - steps, 0), s.stop + steps) for s in box)
    near = components[wide][dilated(lesions[wide] == number, steps)]
    return [int(i) for i in np.unique(near) if i]


def _dice(lesion: np.ndarray, found: np.ndarray) -> float:
    c = count(lesion, found)
    return 2 * c.tp / (c.n_reference + c.n_prediction)
