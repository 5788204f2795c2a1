"""Pictures with several promptable objects that are not tumours: what vit_nano is pre-trained on.

The objects and grounds are those of `datasets.shapes`; added are structures of lesion-free brains and Voronoi cells
as objects, patches of another texture, and *veils*: objects of uneven, often faint contrast and soft border through
which the ground shines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from medsam_lora.datasets.brain_slices import BrainSlices, brain_slices, draw_structure, place_slice
from medsam_lora.datasets.outlines import OUTLINES, PlaneNoise
from medsam_lora.datasets.shapes import (
    OTHERS_RANGE,
    SIDE_RANGE,
    box_of,
    draw_cells,
    draw_ground,
    draw_object,
    draw_shapes,
    expose,
    paint,
)

MOST_OBJECTS = 4
"""Objects painted into a picture; up to two structures of its ground come on top."""

_KINDS = tuple(OUTLINES.values())
_SOFT_KINDS = tuple(OUTLINES[name] for name in ("blob", "cloud", "lobes", "branches"))
_LEAST_PIXELS = 6
_LEAST_VISIBLE = 0.6


@dataclass(frozen=True)
class Scene:
    """A picture and what can be asked for in it.

    Parameters
    ----------
    image : ndarray of float32, shape (H, W)
        Grey, 0 to 255.
    masks : ndarray of bool, shape (K, H, W)
        One per object, at least one; the visible part.
    painted : ndarray of bool, shape (H, W)
        Everything that was painted in front of the ground: what SAM without a prompt is asked for.
    """

    image: np.ndarray
    masks: np.ndarray
    painted: np.ndarray


def make_scene(generator: np.random.Generator, size: int = 256, brains: BrainSlices | None = None) -> Scene:
    """Draw a picture with objects.

    Parameters
    ----------
    generator : numpy.random.Generator
    size : int
        Side of the picture in pixels.
    brains : BrainSlices, optional
        `brain_slices()` where absent (made at the first call, in seconds).

    Returns
    -------
    Scene
    """
    in_brain = generator.random() < 0.5
    structures: list[np.ndarray] = []
    if in_brain:
        picture, tissue, right = place_slice(generator, brain_slices() if brains is None else brains, size)
        for _ in range(int(generator.integers(0, 3))):
            structure = draw_structure(generator, tissue, right)
            structures += [] if structure is None else [structure]
    else:
        picture, structures = _plain_ground(generator, size)
    whole = list(structures)
    visible = list(structures)
    painted = np.zeros((size, size), bool)
    count = 1 + int(generator.integers(MOST_OBJECTS))
    ground = picture
    for index in range(count):
        sides = SIDE_RANGE if index >= count - 2 else OTHERS_RANGE
        if generator.random() < (0.65 if in_brain else 0.25):
            mask = draw_object(generator, size, sides, ground, _SOFT_KINDS if generator.random() < 0.6 else _KINDS)
            # Nothing is seen of a veil over air.
            on_tissue = mask & (ground > 0.01)
            mask = on_tissue if on_tissue.sum() >= _LEAST_PIXELS else mask
            picture = _veiled(generator, picture, mask)
        else:
            mask = draw_object(generator, size, sides, ground)
            picture = paint(generator, picture, mask, None)
        visible = [*(other & ~mask for other in visible), mask]
        whole.append(mask)
        painted |= mask
    return Scene(expose(generator, picture), np.stack(_to_ask_for(visible, whole)), painted)


def shapes_scene(generator: np.random.Generator, size: int = 256) -> Scene:
    """A picture of `datasets.shapes` as a scene: what lies about its object is asked for as well.

    The encoder costs most, and answers for all of them at once.
    """
    image, objects = draw_shapes(generator, size)
    visible, whole = zip(*objects, strict=True)
    return Scene(image, np.stack(_to_ask_for(visible, whole)), np.logical_or.reduce(visible))


def _to_ask_for(visible: Sequence[np.ndarray], whole: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of objects, the visible parts that tell what the object is."""
    return [
        seen
        for seen, all_of_it in zip(visible, whole, strict=True)
        if seen.sum() >= max(_LEAST_VISIBLE * all_of_it.sum(), _LEAST_PIXELS)
    ]


def _plain_ground(generator: np.random.Generator, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A ground that is not anatomy, and a Voronoi cell of it where it has such."""
    if generator.random() < 0.25:
        rows = np.arange(size, dtype=np.float32) / np.float32(size)
        picture = draw_cells(generator, rows)
        i, j = generator.integers(size, size=2)
        cell = picture == picture[i, j]
        return picture, [cell] if cell.sum() >= _LEAST_PIXELS else []
    return draw_ground(generator, size, np.zeros((0, 1, 1), np.float32)), []


def _veiled(generator: np.random.Generator, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with a veil over `mask`: brighter, darker or of another texture, with cores and rims of its own."""
    box = box_of(mask).astype(int)
    side = int(max(box[2] - box[0], box[3] - box[1]))
    softness = float(generator.uniform(0.0, 0.05)) * side
    pad = int(3 * softness) + 2
    part = (slice(max(box[0] - pad, 0), box[2] + pad), slice(max(box[1] - pad, 0), box[3] + pad))
    inside = mask[part].astype(np.float32)
    under = picture[part]
    u, v = (np.arange(n, dtype=np.float32) / np.float32(side) for n in inside.shape)
    coarse = PlaneNoise.draw(generator, float(generator.uniform(0.15, 0.5))).at(u, v)
    fine = PlaneNoise.draw(generator, float(generator.uniform(0.03, 0.10))).at(u, v)
    contrast = float(np.exp(generator.uniform(np.log(0.05), np.log(0.45)))) * float(generator.choice([-1, 1]))
    if contrast < 0 and float(under[inside > 0].mean()) + contrast < 0.02:
        contrast = -contrast
    change = contrast * (1 + float(generator.uniform(0, 0.4)) * coarse)
    change += float(generator.uniform(0, 0.06)) * fine
    if generator.random() < 0.5:
        change = _with_cores(generator, change, inside, side, contrast)
    alpha = gaussian_filter(inside, softness, truncate=3.0) if softness > 0.3 else inside
    mean = np.float32(under[inside > 0].mean())
    damped = 1 - float(generator.uniform(0, 0.5)) * np.clip(np.abs(under - mean) * 4, 0, 1)
    shine = float(generator.uniform(0.0, 1.0))
    flat = under + (1 - shine) * 0.7 * (mean - under)
    result = picture.copy()
    # Air stays black, as outside the skull.
    result[part] = np.where(under > 0, under + alpha * (flat - under + change * damped), under)
    return np.clip(result, 0, None)


def _with_cores(
    generator: np.random.Generator, change: np.ndarray, inside: np.ndarray, side: int, contrast: float
) -> np.ndarray:
    """The change of grey with one or two nested cores, not always in the middle: rims and patches."""
    depth = gaussian_filter(inside, float(generator.uniform(0.06, 0.16)) * side, truncate=2.0)
    u, v = (np.arange(n, dtype=np.float32) / np.float32(side) for n in inside.shape)
    roughness = float(generator.uniform(0.05, 0.3))
    depth += roughness * PlaneNoise.draw(generator, float(generator.uniform(0.1, 0.4))).at(u, v)
    level = float(generator.uniform(0.6, 0.95))
    for _ in range(int(generator.integers(1, 3))):
        core = np.clip((depth - level) * 12, 0, 1)
        other = contrast * float(generator.uniform(-1.2, 2.0))
        change = change + core * (np.float32(other) - change)
        level += float(generator.uniform(0.04, 0.2))
    return change
