"""Pictures are hung as radiologists hang them, and outlines lie on the border of the mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

from medsam_lora.analysis.overlays import Panel, mosaic, outline, render

RED, GREEN = (255, 0, 0), (0, 255, 0)


def test_the_patients_right_is_on_the_left_and_the_front_is_up() -> None:
    image = np.full((40, 60), 100.0)
    mask = np.zeros((40, 60), bool)
    mask[35:39, 50:58] = True  # high X: patient's right; high Y: front
    pixels = np.asarray(render(Panel(image, {RED: mask}), 120))[:120]
    rows, columns = np.nonzero((pixels == RED).all(axis=-1))
    assert rows.max() < 60 and columns.max() < pixels.shape[1] / 2


def test_the_outline_is_inside_the_mask_and_closed() -> None:
    mask = np.zeros((12, 12), bool)
    mask[2:9, 3:10] = True
    border = outline(mask)
    assert border.sum() == 2 * 7 + 2 * 5 and not (border & ~mask).any()


def test_a_background_of_zeros_stays_black_and_brain_does_not() -> None:
    image = np.zeros((20, 20))
    image[5:15, 5:15] = np.linspace(50, 90, 100).reshape(10, 10)
    pixels = np.asarray(render(Panel(image, {}), 20))[:20]
    assert (pixels[:3] == 0).all() and (pixels[8:12, 8:12] > 0).all()


def test_a_mosaic_holds_every_panel_and_its_legend() -> None:
    panel = Panel(np.full((30, 40), 10.0), {GREEN: np.ones((30, 40), bool)}, "case")
    picture = mosaic([[panel, panel], [panel]], {"reference": GREEN}, "title", height=100)
    assert isinstance(picture, Image.Image)
    pixels = np.asarray(picture)
    assert pixels.shape[0] > 2 * 118 and pixels.shape[1] > 2 * 75
    assert (pixels == GREEN).all(axis=-1).sum() > 3 * 2 * (75 + 100) * 0.9
