"""Pictures of slices with outlines of masks, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

_GAP = 4
_TEXT = (230, 230, 230)
_BACKGROUND = (16, 16, 18)


@dataclass(frozen=True)
class Panel:
    """One picture: a grey slice, outlines on it, and a line of text under it.

    Parameters
    ----------
    image : ndarray of float, shape (X, Y)
        In RAS index order (X to the right of the patient, Y to the front).
    outlines : mapping of colour to mask
        RGB colours and masks of bool, shape (X, Y), drawn in order.
    caption : str
    """

    image: np.ndarray
    outlines: Mapping[Colour, np.ndarray]
    caption: str = ""


def render(panel: Panel, height: int) -> Image.Image:
    """Draw a panel as radiologists hang it: the patient's right on the left, front up.

    Parameters
    ----------
    panel : Panel
    height : int
        In pixels, without the caption.
    """
    grey = _display(panel.image)
    scale = height / grey.shape[0]
    size = (round(grey.shape[1] * scale), height)
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    pixels = np.asarray(picture).copy()
    for colour, mask in panel.outlines.items():
        big = np.asarray(Image.fromarray(_hang(mask).astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0
        pixels[outline(big)] = colour
    canvas = Image.new("RGB", (size[0], height + 18), _BACKGROUND)
    canvas.paste(Image.fromarray(pixels), (0, 0))
    ImageDraw.Draw(canvas).text((3, height + 3), panel.caption, _TEXT, ImageFont.load_default(12))
    return canvas


def outline(mask: np.ndarray) -> np.ndarray:
    """Foreground pixels with a 4-neighbour in the background (pixels beyond the border count as background).

    Examples
    --------
    >>> outline(np.ones((3, 3), bool)).astype(int).tolist()
    [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    """
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def mosaic(rows: Sequence[Sequence[Panel]], legend: Mapping[str, Colour], title: str, height: int = 240) -> Image.Image:
    """Panels in rows, with a title and a legend of outline colours.

    Parameters
    ----------
    rows : sequence of sequences of Panel
    legend : mapping of str to colour
    title : str
    height : int
        Of every panel, in pixels.
    """
    drawn = [[render(panel, height) for panel in row] for row in rows]
    n_columns = max(len(row) for row in drawn)
    columns = [max(row[c].width for row in drawn if c < len(row)) + _GAP for c in range(n_columns)]
    width = max(sum(columns), 420)
    total = sum(max(p.height for p in row) + _GAP for row in drawn)
    canvas = Image.new("RGB", (width + _GAP, total + 44), _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 4), title, _TEXT, ImageFont.load_default(14))
    x = _GAP
    for name, colour in legend.items():
        pen.rectangle((x, 27, x + 10, 37), fill=colour)
        pen.text((x + 14, 24), name, _TEXT, ImageFont.load_default(12))
        x += 24 + int(pen.textlength(name, ImageFont.load_default(12)))
    y = 42
    for row in drawn:
        x = _GAP
        for picture, column in zip(row, columns[: len(row)], strict=True):
            canvas.paste(picture, (x, y))
            x += column
        y += max(p.height for p in row) + _GAP
    return canvas


def _hang(plane: np.ndarray) -> np.ndarray:
    # Rows run from front to back, columns from the patient's right to left: the radiological view.
    return plane[::-1, ::-1].T


def _display(plane: np.ndarray) -> np.ndarray:
    hung = _hang(np.asarray(plane, np.float32))
    inside = hung[hung != 0]
    if inside.size == 0:
        return np.zeros(hung.shape, np.uint8)
    low, high = np.percentile(inside, [1, 99.5])
    scaled = np.clip((hung - low) / max(high - low, 1e-6), 0, 1) * 225 + 20
    return np.where(hung != 0, scaled, 0).astype(np.uint8)
