"""Draw `docs/images/phantom.png`: some phantom cases in four modalities with their labels, three planes each.

python benchmarks/phantom_figure.py --out docs/images/phantom.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from medsam_lora.datasets.phantom import PhantomCase, make_case
from medsam_lora.labels import ET, MODALITIES, NETC, SNFH

COLOURS = {NETC: (230, 51, 51), SNFH: (51, 204, 89), ET: (255, 217, 26)}
PIXEL_MM = 1.25
COLUMNS = 152
ROWS = {0: 124, 1: 124, 2: 152}
"""Rows of a tile, by the axis it is perpendicular to."""


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A plane of an L-P-S volume as it is looked at: front or top upwards, the patient's left on the right."""
    if axis == 2:
        return volume[:, :, index].T
    return np.take(volume, index, axis)[:, ::-1].T


def resized(
    image: np.ndarray, spacing_mm: tuple[float, float], tile: tuple[int, int], method: Image.Resampling
) -> np.ndarray:
    """A plane on square pixels, in the middle of a tile."""
    rows, columns = (round(n * s / PIXEL_MM) for n, s in zip(image.shape, spacing_mm, strict=True))
    scaled = np.asarray(Image.fromarray(image).resize((columns, rows), method))
    # Cut or pad to the tile, about the middle.
    for axis, wanted in enumerate(tile):
        spare = scaled.shape[axis] - wanted
        scaled = np.take(scaled, np.arange(max(spare, 0) // 2, max(spare, 0) // 2 + min(wanted, wanted + spare)), axis)
        pad = [(0, 0), (0, 0)]
        pad[axis] = (max(-spare, 0) // 2, max(-spare, 0) - max(-spare, 0) // 2)
        scaled = np.pad(scaled, pad)
    return scaled


def row(case: PhantomCase, axis: int, index: int) -> np.ndarray:
    """The four modalities of one plane, and the labels on t2f, side by side."""
    across, down = (s for a, s in enumerate(case.geometry.spacing_mm) if a != axis)
    tile = (ROWS[axis], COLUMNS)
    tiles = []
    for image in case.images:
        grey = np.clip(image / np.percentile(image[image > 0], 99.6), 0, 1)
        flat = resized(
            (plane(grey, axis, index) * 255).astype(np.uint8), (down, across), tile, Image.Resampling.BICUBIC
        )
        tiles.append(np.repeat(flat[..., None], 3, axis=2))
    labels = resized(plane(case.label_map, axis, index), (down, across), tile, Image.Resampling.NEAREST)
    overlay = tiles[MODALITIES.index("t2f")].copy()
    for label, colour in COLOURS.items():
        overlay[labels == label] = tinted(overlay[labels == label], colour)
    return np.hstack([*tiles, overlay])


def tinted(grey: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Grey under a colour, as uint8."""
    return (0.45 * grey + 0.55 * np.array(colour)).astype(np.uint8)


def palette() -> Image.Image:
    """The colours of the figure: 136 greys, and 40 under each label's colour."""
    colours = [np.repeat(np.linspace(0, 255, 136)[:, None], 3, axis=1)]
    colours += [tinted(np.repeat(np.linspace(0, 255, 40)[:, None], 3, axis=1), colour) for colour in COLOURS.values()]
    holder = Image.new("P", (1, 1))
    holder.putpalette(np.vstack(colours).astype(np.uint8).tobytes())
    return holder


def planes_through(case: PhantomCase) -> list[tuple[int, int]]:
    """The transverse, coronal and sagittal plane with most tumour, as (axis, index)."""
    tumour = case.label_map > 0
    return [(axis, int(tumour.sum(axis=tuple(a for a in range(3) if a != axis)).argmax())) for axis in (2, 1, 0)]


def figure(seed: int, indices: list[int]) -> Image.Image:
    """All cases one below the other, under a line of names."""
    rows = []
    for index in indices:
        case = make_case(seed, index)
        rows += [row(case, axis, place) for axis, place in planes_through(case)]
    picture = Image.fromarray(np.vstack([np.zeros((16, rows[0].shape[1], 3), np.uint8), *rows]))
    pen = ImageDraw.Draw(picture)
    for column, name in enumerate((*MODALITIES, "labels")):
        pen.text((column * COLUMNS + 6, 2), name, fill=(220, 220, 220))
    return picture


def main() -> None:
    """Draw the figure that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/phantom.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, nargs="+", default=[0, 2, 3])
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture = figure(arguments.seed, arguments.cases)
    # A palette takes a third of the bytes.
    picture.quantize(palette=palette(), dither=Image.Dither.NONE).save(arguments.out, optimize=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
