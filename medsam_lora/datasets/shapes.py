"""Promptable segmentation that is not tumours: one object, its mask and box, in a picture made to mislead.

A small promptable model is pre-trained on these: objects of many outlines, sizes and contrasts, brighter or darker
than what surrounds them or different in texture only, with rims, gradients, soft borders, distractors and
occlusion, on flat, cloudy, striped or cellular grounds and on lesion-free phantom anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from scipy.ndimage import gaussian_filter

from medsam_lora.datasets.outlines import OUTLINES, Outline, PlaneNoise, largest_part, window
from medsam_lora.datasets.phantom import make_case

SIDE_RANGE: Final = (0.12, 0.65)
"""Longest side of an object over the side of the image, before occlusion.

At 256 px the least is 31: two patches of the encoder, eight cells of the decoder's grid. On smaller things that grid
alone costs a fifth of the IoU.
"""

OTHERS_RANGE: Final = (0.08, 0.40)
"""The same of what lies about or covers an object."""

_KINDS = tuple(OUTLINES.values())
_LEAST_PIXELS = 6


@dataclass(frozen=True)
class ShapeSample:
    """A picture with one object to be found.

    Parameters
    ----------
    image : ndarray of float32, shape (3, H, W)
        Three equal channels, 0 to 255.
    mask : ndarray of bool, shape (H, W)
    box : ndarray of float32, shape (4,)
        ``(i0, j0, i1, j1)`` of the mask, on pixel edges, half-open.
    """

    image: np.ndarray
    mask: np.ndarray
    box: np.ndarray


@lru_cache(maxsize=2)
def anatomy_slices(seed: int = 715_000, cases: int = 2) -> np.ndarray:
    """Transverse slices of lesion-free phantoms, to stand behind the objects.

    The seed is far from those of cohorts, so that what is trained on these has not seen a cohort's heads.

    Returns
    -------
    ndarray of float32, shape (N, 112, 96)
        0 to 1, rows from front to back; read-only, as it is kept.
    """
    slices = []
    for index in range(cases):
        case = make_case(seed, index, (96, 112, 20), lesions=False)
        for image in case.images:
            bright = np.percentile(image[image > 0], 99.5)
            scaled = np.clip(image / np.float32(bright), 0, 1)
            slices += [scaled[:, :, k].T for k in range(image.shape[2]) if (image[:, :, k] > 0).mean() > 0.15]
    stack = np.ascontiguousarray(np.stack(slices), np.float32)
    stack.setflags(write=False)
    return stack


def make_sample(generator: np.random.Generator, size: int = 256, anatomy: np.ndarray | None = None) -> ShapeSample:
    """Draw a picture with an object.

    Parameters
    ----------
    generator : numpy.random.Generator
    size : int
        Side of the image in pixels.
    anatomy : ndarray of float32, shape (N, h, w), optional
        Slices in 0..1 for a part of the grounds; `anatomy_slices` where absent (made at the first call, in about a
        second).

    Returns
    -------
    ShapeSample
    """
    image, objects = draw_shapes(generator, size, anatomy)
    mask = objects[-1][0]
    return ShapeSample(np.repeat(image[None], 3, axis=0), mask, box_of(mask))


def draw_shapes(
    generator: np.random.Generator, size: int, anatomy: np.ndarray | None = None
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """The picture of `make_sample` with all that lies in it.

    Returns
    -------
    image : ndarray of float32, shape (H, W)
        Grey, 0 to 255.
    objects : list of (visible, whole)
        ndarray of bool, shape (H, W), each: what was drawn about the object, what covers it, and, last, the object.
    """
    ground = draw_ground(generator, size, anatomy_slices() if anatomy is None else anatomy)
    mask = draw_object(generator, size, SIDE_RANGE, ground)
    picture = ground
    whole: list[np.ndarray] = []
    for _ in range(int(generator.integers(0, 5))):
        whole.append(draw_object(generator, size, OTHERS_RANGE, ground))
        picture = paint(generator, picture, whole[-1], mask)
    whole.append(mask)
    picture = paint(generator, picture, mask, None)
    if generator.random() < 0.25:
        cover = draw_object(generator, size, OTHERS_RANGE, ground)
        # An occluder must leave most of the object, or the box would be about something else.
        if cover.any() and (mask & ~cover).sum() >= max(0.6 * mask.sum(), _LEAST_PIXELS):
            picture = paint(generator, picture, cover, None)
            whole.append(cover)
    visible: list[np.ndarray] = []
    for one in whole:
        visible = [*(other & ~one for other in visible), one]
    objects = list(zip(visible, whole, strict=True))
    asked = next(i for i, one in enumerate(whole) if one is mask)
    return expose(generator, picture), [*objects[:asked], *objects[asked + 1 :], objects[asked]]


def box_of(mask: np.ndarray) -> np.ndarray:
    """Bounding box ``(i0, j0, i1, j1)`` of a mask on pixel edges, half-open, float32.

    Examples
    --------
    >>> box_of(np.array([[0, 0, 0], [0, 1, 1]], bool)).tolist()
    [1.0, 1.0, 2.0, 3.0]
    """
    i, j = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([i[0], j[0], i[-1] + 1, j[-1] + 1], np.float32)


def draw_object(
    generator: np.random.Generator,
    size: int,
    side_range: tuple[float, float],
    ground: np.ndarray,
    kinds: Sequence[Callable[[np.random.Generator], Outline]] = _KINDS,
) -> np.ndarray:
    """Mask of one object wholly inside the image, seldom on nothing but black.

    Parameters
    ----------
    generator : numpy.random.Generator
    size : int
        Side of the image in pixels.
    side_range : tuple of float
        Least and largest longest side over `size`.
    ground : ndarray of float32, shape (size, size)
    kinds : sequence
        Values of `OUTLINES` to choose from.

    Returns
    -------
    ndarray of bool, shape (size, size)
    """
    while True:
        outline = kinds[int(generator.integers(len(kinds)))](generator)
        extent = window(outline)
        # Sizes spread evenly in the logarithm favour the small, and those spread evenly the large: half of each.
        low, high = side_range
        share = float(generator.choice([generator.uniform(low, high), low * (high / low) ** generator.random()]))
        place, anywhere = generator.random(2), generator.random() < 0.1
        if extent is None:
            continue
        mask = _drawn(outline, extent, size, max(share * size, 4.0), place)
        if mask.sum() >= _LEAST_PIXELS and (anywhere or ground[mask].mean() > 0.05):
            return mask


def _drawn(
    outline: Outline, extent: tuple[float, float, float, float], size: int, side: float, place: np.ndarray
) -> np.ndarray:
    u0, v0, u1, v1 = extent
    scale = side / max(u1 - u0, v1 - v0)
    height, width = min(int(np.ceil((u1 - u0) * scale)), size), min(int(np.ceil((v1 - v0) * scale)), size)
    u = ((np.arange(height) + 0.5) / scale + u0).astype(np.float32)
    v = ((np.arange(width) + 0.5) / scale + v0).astype(np.float32)
    inside = largest_part(outline(u[:, None], v[None, :]) > 0)
    mask = np.zeros((size, size), bool)
    i, j = int(place[0] * (size - height + 1)), int(place[1] * (size - width + 1))
    mask[i : i + height, j : j + width] = inside
    return mask


def draw_ground(generator: np.random.Generator, size: int, anatomy: np.ndarray) -> np.ndarray:
    """A background, about 0 to 1."""
    kind = generator.random()
    level = generator.uniform(0.15, 0.75)
    if kind < 0.35 and len(anatomy):
        return _anatomy(generator, size, anatomy[int(generator.integers(len(anatomy)))])
    rows = np.arange(size, dtype=np.float32) / np.float32(size)
    clouds = PlaneNoise.draw(generator, generator.uniform(0.08, 0.4)).at(rows, rows)
    if kind < 0.55:
        return level + generator.uniform(0.0, 0.15) * clouds
    if kind < 0.7:
        return level + _stripes(generator, rows, clouds)
    if kind < 0.85:
        return draw_cells(generator, rows)
    fine = PlaneNoise.draw(generator, generator.uniform(0.02, 0.06)).at(rows, rows)
    return level + generator.uniform(0.02, 0.12) * fine + generator.uniform(0.02, 0.12) * clouds


def _anatomy(generator: np.random.Generator, size: int, image: np.ndarray) -> np.ndarray:
    """A slice, turned, zoomed and moved, on the pixels of the picture."""
    image = np.rot90(image, int(generator.integers(4)))[:: int(generator.choice([-1, 1]))]
    zoom = generator.uniform(0.45, 1.15) * max(image.shape)
    weights = []
    for n in image.shape:
        start = (n - zoom) / 2 + generator.uniform(-0.15, 0.15) * n
        position = start + (np.arange(size) + 0.5) / size * zoom - 0.5
        # Linear interpolation as a matrix of hat functions; beyond the slice it is 0, as beyond the skull.
        weights.append(np.maximum(1 - np.abs(position[:, None] - np.arange(n)), 0).astype(np.float32))
    return weights[0] @ image @ weights[1].T


def _stripes(generator: np.random.Generator, rows: np.ndarray, clouds: np.ndarray) -> np.ndarray:
    angle, frequency = generator.uniform(0, np.pi), generator.uniform(4, 40)
    phase = 2 * np.pi * frequency * (np.cos(angle) * rows[:, None] + np.sin(angle) * rows[None, :])
    return generator.uniform(0.03, 0.15) * np.sin(phase.astype(np.float32) + generator.uniform(0, 2) * clouds)


def draw_cells(generator: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """Voronoi cells of different grey."""
    nearest = np.full((rows.size, rows.size), np.inf, np.float32)
    grey = np.zeros_like(nearest)
    for _ in range(int(generator.integers(6, 22))):
        a, b = generator.random(2, dtype=np.float32)
        distance = ((rows - a) ** 2)[:, None] + ((rows - b) ** 2)[None, :]
        np.copyto(grey, np.float32(generator.uniform(0.1, 0.9)), where=distance < nearest)
        np.minimum(nearest, distance, out=nearest)
    return grey


def paint(
    generator: np.random.Generator, picture: np.ndarray, mask: np.ndarray, keep_clear: np.ndarray | None
) -> np.ndarray:
    """The picture with an object in it, its border more or less soft, and nothing of it on `keep_clear`."""
    box = box_of(mask).astype(int)
    side = int(max(box[2] - box[0], box[3] - box[1]))
    softness = float(generator.choice([0.0, 0.6, 1.2, 2.5, 4.0])) * min(1.0, side / 60)
    pad = int(4 * softness) + 2
    part = (slice(max(box[0] - pad, 0), box[2] + pad), slice(max(box[1] - pad, 0), box[3] + pad))
    inside = mask[part].astype(np.float32)
    under = picture[part]
    fill = _fill(generator, under, inside, side)
    alpha = gaussian_filter(inside, softness, truncate=3.0) if softness > 0 else inside
    if keep_clear is not None:
        alpha = alpha * ~keep_clear[part]
    result = picture.copy()
    result[part] = under + alpha * (fill - under)
    return result


def _fill(generator: np.random.Generator, under: np.ndarray, inside: np.ndarray, side: int) -> np.ndarray:
    """What an object is filled with: even, textured, graded, cored, or letting shine through what is `under` it."""
    mean = float(under[inside > 0].mean())
    # Far enough from what lies under it to be seen, up or down.
    contrast = float(generator.uniform(0.10, 0.50)) * float(generator.choice([-1, 1]))
    if not 0.0 <= mean + contrast <= 1.0:
        contrast = -contrast
    u, v = (np.arange(n, dtype=np.float32) / np.float32(side) for n in inside.shape)
    roughness = float(generator.uniform(0, 0.3)) * abs(contrast)
    texture = PlaneNoise.draw(generator, generator.uniform(0.08, 0.5)).at(u, v)
    gradient = contrast * float(generator.uniform(-0.5, 0.5)) * float(generator.integers(2))
    fill = mean + contrast + roughness * texture + gradient * (u[:, None] - np.float32(0.5))
    style = generator.random()
    if style < 0.4 and side > 10:
        return _cored(generator, fill, inside, side, mean, contrast)
    if style < 0.5:
        return fill + float(generator.uniform(0.3, 0.8)) * (under - mean)
    return fill


def _cored(
    generator: np.random.Generator, fill: np.ndarray, inside: np.ndarray, side: int, mean: float, contrast: float
) -> np.ndarray:
    """A fill with a core of another grey, often of the opposite contrast: what is left is a rim, even or broken."""
    sigma = float(generator.uniform(0.05, 0.14)) * side
    # A blurred mask falls from 1 in the middle to about one half at the border.
    depth = gaussian_filter(inside, sigma, truncate=2.5)
    u, v = (np.arange(n, dtype=np.float32) / np.float32(side) for n in inside.shape)
    depth += generator.uniform(0, 0.2) * PlaneNoise.draw(generator, generator.uniform(0.08, 0.25)).at(u, v)
    middle = np.clip((depth - generator.uniform(0.65, 0.85)) * 12, 0, 1)
    core = np.clip(mean + contrast * generator.uniform(-1.0, 2.0), 0, 1)
    return fill + middle * (np.float32(core) - fill)


def expose(generator: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """The picture as a camera would give it, 0 to 255: uneven light, blur, noise, grey curve, perhaps a negative."""
    size = picture.shape[0]
    rows = np.arange(size, dtype=np.float32) / np.float32(size)
    if generator.random() < 0.5:
        light = PlaneNoise.draw(generator, 0.8).at(rows, rows)
        picture = picture * (1 + generator.uniform(0.05, 0.2) * light)
    blur = float(generator.choice([0.0, 0.0, 0.5, 0.9])) * size / 256
    if blur > 0:
        picture = gaussian_filter(picture, blur, truncate=3.0)
    picture = picture + generator.uniform(0, 0.06) * generator.standard_normal(picture.shape, dtype=np.float32)
    picture = np.clip(picture, 0, 1) ** np.float32(np.exp(generator.normal(0, 0.2)))
    if generator.random() < 0.25:
        picture = 1 - picture
    return (picture * 255).astype(np.float32)
