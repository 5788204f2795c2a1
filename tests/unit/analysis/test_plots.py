"""What the plots show, read from the figures and from the files they become."""

from __future__ import annotations

import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from medsam_lora.analysis.curves import training_curves
from medsam_lora.analysis.figures import DPI, FLOOR_COLOUR, figure_png, figure_svg
from medsam_lora.analysis.plots import bland_altman_plot, paired_plot

SVG = "{http://www.w3.org/2000/svg}"
SCORES = {"filled box": [0.4, 0.5, 0.6], "zero-shot": [0.6, 0.7, 0.0], "lora $a$ & <b>": [0.8, 0.85, 0.9]}


def paired(**options: object):
    given = {"axis": "Dice (higher is better)", "title": "Dice, whole tumour (WT)", "floor": "filled box"}
    return paired_plot(SCORES, **{**given, "failed": {"zero-shot": [False, False, True]}, **options})


def texts(figure) -> list[str]:
    """Every piece of text of the SVG, which has to be well-formed."""
    root = ElementTree.fromstring(figure_svg(figure))
    assert root.tag == f"{SVG}svg"
    return ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]


def segments(axes) -> list[list[list[float]]]:
    """The lines of an axes as points."""
    return [line.get_xydata().tolist() for line in axes.get_lines()]


def test_labels_are_text_that_a_reader_can_find():
    found = texts(paired())
    for label in ("Dice (higher is better)", "Dice, whole tumour (WT)", "zero-shot", "lora $a$ & <b>", "mean",
                  "one case (of 3)", "no usable prediction"):  # fmt: skip
        assert label in found, label


def test_the_svg_can_stand_in_a_page():
    first, second = figure_svg(paired()), figure_svg(paired(title="Another"))
    assert first.startswith('<svg role="img" aria-label="Dice, whole tumour (WT)"')
    for forbidden in ("<?xml", "<!DOCTYPE", "<style", "<script", "dc:date"):
        assert forbidden not in first
    # Every reference is answered inside the same picture, and a name means the same shape in every picture.
    shapes = {}
    for text in (first, second):
        root = ElementTree.fromstring(text)
        named = {node.get("id"): node for node in root.iter() if node.get("id")}
        used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
        assert {a or b for a, b in used} <= set(named)
        for name, node in named.items():
            assert shapes.setdefault(name, ElementTree.tostring(node)) == ElementTree.tostring(node)


def test_equal_figures_give_equal_bytes():
    assert figure_svg(paired()) == figure_svg(paired())
    assert figure_png(paired()) == figure_png(paired())
    assert figure_png(paired()) != figure_png(paired(failed={}))


def test_the_settings_of_matplotlib_are_left_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_png(paired())
    figure_svg(paired())
    assert dict(matplotlib.rcParams) == before


def test_the_png_opens():
    figure = paired()
    picture = Image.open(io.BytesIO(figure_png(figure)))
    assert picture.size == tuple(round(DPI * side) for side in figure.get_size_inches())
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_case_is_a_line_through_its_scores():
    axes = paired().axes[0]
    assert [[0, 0.4], [1, 0.6], [2, 0.8]] in segments(axes)
    assert [[0, 0.6], [1, 0.0], [2, 0.9]] in segments(axes)
    diamonds = [c.get_offsets().tolist()[0] for c in axes.collections if c.get_zorder() == 5]
    assert diamonds == [pytest.approx([at, np.mean(values)]) for at, values in enumerate(SCORES.values())]
    crosses = [c.get_offsets().tolist() for c in axes.collections if c.get_zorder() == 4]
    assert crosses == [[], [[1, 0.0]], []]


def test_the_floor_is_grey():
    import matplotlib.colors

    box = paired().axes[0].patches[0]
    assert matplotlib.colors.to_hex(box.get_facecolor()) == FLOOR_COLOUR.lower()


def test_distances_of_an_empty_mask_do_not_hide_the_others():
    near = paired_plot({"a": [1, 2, 3], "b": [2, 2, 4]}, axis="mm", title="HD95", share=False)
    far = paired_plot({"a": [1, 2, 3], "b": [2, 2, 374]}, axis="mm", title="HD95", share=False)
    assert (near.axes[0].get_yscale(), far.axes[0].get_yscale()) == ("linear", "symlog")


def test_bland_altman_by_hand():
    # Differences 1, 3, 2: mean 2, standard deviation 1; the case without a prediction is counted, not drawn.
    figure = bland_altman_plot({"lora": ([10, 20, 30, 40], [11, 23, 32, math.nan])}, title="Volume")
    axes = figure.axes[0]
    (points,) = axes.collections
    assert points.get_offsets().tolist() == [[10.5, 1], [21.5, 3], [31, 2]]
    levels = sorted(line.get_ydata()[0] for line in axes.get_lines())
    assert levels == pytest.approx([0, 2 - 1.96, 2, 2 + 1.96])
    found = texts(figure)
    assert "3 cases, 1 without a prediction" in found and "mean difference +2.0 ml" in found
    assert "limits of agreement 0.0 to +4.0 ml" in found
    assert "prediction − reference (ml)" in found and "mean of prediction and reference (ml)" in found


@pytest.mark.parametrize(("prediction", "lines"), [([11.0], 2), ([math.nan], 1)])
def test_bland_altman_of_one_case_or_none(prediction: list[float], lines: int):
    figure = bland_altman_plot({"lora": ([10.0], prediction)}, title="Volume")
    assert len(figure.axes[0].get_lines()) == lines
    assert not any(text.startswith("limits") for text in texts(figure))


def log(fold: str, losses: list[float], dice: list[float]) -> list[dict[str, str]]:
    rows = [{"fold": fold, "epoch": "0", "loss": "", "train_dice": "", "val_dice": "0.5"}]
    for epoch, (loss, value) in enumerate(zip(losses, dice, strict=True), 1):
        rows.append({"fold": fold, "epoch": str(epoch), "loss": str(loss), "train_dice": "0.4", "val_dice": str(value)})
    return rows


def test_curves_show_folds_and_their_mean_where_every_fold_was_trained():
    figure = training_curves(
        {"LoRA": log("fold0", [1.0, 0.5, 0.25], [0.6, 0.7, 0.9]) + log("fold1", [2, 1.5], [0.8, 0.9])}
    )
    left, right = figure.axes
    assert segments(left) == [[[1, 1], [2, 0.5], [3, 0.25]], [[1, 2], [2, 1.5]], [[1, 1.5], [2, 1]]]
    assert segments(right)[2] == [[0, 0.5], [1, pytest.approx(0.7)], [2, pytest.approx(0.8)]]
    found = texts(figure)
    assert {"LoRA", "epoch", "training loss (lower is better)", "Dice (higher is better)"} <= set(found)


def test_no_curves_of_what_was_not_trained():
    assert training_curves({}) is None
    assert training_curves({"zero-shot": log("", [], [])}) is None
