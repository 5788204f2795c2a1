"""Stills of single cases: every modality at the slice with most tumour, reference and prediction outlined."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medsam_lora.analysis.overlays import Colour, Panel, outline, render
from medsam_lora.report.cases import REGION_BITS, ShownCase, largest_slice

# Apart for the colour-blind as well, and on grey.
REFERENCE_COLOUR: Colour = (86, 196, 255)
PREDICTION_COLOUR: Colour = (255, 150, 30)

_HEIGHT = 320


@dataclass(frozen=True)
class Still:
    """One modality of a case as a picture.

    Parameters
    ----------
    modality : str
    uri : str
        ``data:image/png;base64,...``
    width, height : int
        In pixels.
    """

    modality: str
    uri: str
    width: int
    height: int


def stills(case: ShownCase, region: str, label: str) -> list[Still]:
    """Pictures of a case, one for every modality it has.

    Parameters
    ----------
    case : ShownCase
    region : str
        Outlined; its largest slice (of the reference, else of the prediction) is shown.
    label : str
        The run whose prediction is outlined, where it has one.
    """
    bit = REGION_BITS[region]
    masks: dict[Colour, np.ndarray] = {}
    if label in case.predictions:
        masks[PREDICTION_COLOUR] = (case.predictions[label] & bit) > 0
    if case.reference is not None:
        masks[REFERENCE_COLOUR] = (case.reference & bit) > 0
    # The reference is drawn last and looked at first.
    shown = next((m for m in reversed(list(masks.values())) if m.any()), np.zeros(case.geometry.shape, bool))
    k = largest_slice(shown)[2]
    x_mm, y_mm, _ = case.geometry.spacing_mm
    pictures = []
    for name, channel in zip(case.modalities, case.image, strict=True):
        grey = render(Panel(channel[:, :, k], {}), _HEIGHT)
        grey = grey.crop((0, 0, grey.width, _HEIGHT))  # the caption is the page's
        if round(grey.width * x_mm / y_mm) != grey.width:
            grey = grey.resize((round(grey.width * x_mm / y_mm), _HEIGHT))
        pixels = np.asarray(grey).copy()
        for colour, mask in masks.items():
            pixels[_thick_outline(mask[:, :, k], grey.size)] = colour
        picture = Image.fromarray(pixels)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        pictures.append(Still(name, uri, picture.width, picture.height))
    return pictures


def _thick_outline(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    # Hung as `overlays.render` hangs the slice; two pixels wide, to be seen in a column of four.
    hung = Image.fromarray(mask[::-1, ::-1].T.astype(np.uint8) * 255)
    big = np.asarray(hung.resize(size, Image.Resampling.NEAREST)) > 0
    edge = outline(big)
    return edge | outline(big & ~edge)
