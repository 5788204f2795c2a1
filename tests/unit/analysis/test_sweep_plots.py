"""The plots of a sweep, by hand: where points, intervals, seeds and lines stand."""

from __future__ import annotations

import matplotlib.text
import pytest
from matplotlib.figure import Figure

from medsam_lora.analysis.sweeps import Panel, Point, cost_plot, sweep_curve

PATIENTS = ["a", "b"]


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def test_the_curve_of_ranks_by_hand() -> None:
    costs = {"trainable_parameters": 2_000_000, "peak_memory_mib": 900.0, "train_seconds": 60.0}
    points = [
        Point(16, [0.8, 0.9], PATIENTS, [0.8, 0.9], costs),
        Point(2, [0.6, 0.7], PATIENTS, [0.65], {"trainable_parameters": 50_000}),
        Point(4, [0.7, 0.7], PATIENTS),
    ]
    panel = Panel("Whole tumour", {"LoRA": points}, {"zero-shot": 0.5, "filled box": 0.4})
    figure = sweep_curve([panel], key="rank", title="Dice by rank", floor="filled box")
    axes, parameters, memory, seconds = figure.axes
    assert (axes.get_xscale(), axes.xaxis.get_transform().base) == ("log", 2)
    curve = axes.containers[0].lines[0]
    assert curve.get_xydata().tolist() == [[2, pytest.approx(0.65)], [4, pytest.approx(0.7)], [16, pytest.approx(0.85)]]
    # Two patients: the bootstrap reaches from one to the other.
    spans = [path.vertices[:, 1].tolist() for path in axes.containers[0].lines[2][0].get_paths()]
    assert spans[0] == pytest.approx([0.6, 0.7]) and spans[2] == pytest.approx([0.8, 0.9])
    assert [line.get_ydata()[0] for line in axes.get_lines() if len(set(line.get_ydata())) == 1][-2:] == [0.5, 0.4]
    # Seeds are drawn where there are several, beside the interval of the cases.
    (seeds,) = [c for c in axes.collections if c.get_label() == "mean of a single seed"]
    assert seeds.get_offsets().tolist() == [[16, 0.8], [16, 0.9]]
    assert parameters.get_lines()[0].get_xydata().tolist() == [[2, 50_000], [16, 2_000_000]]
    assert memory.get_lines()[0].get_xydata().tolist() == [[16, 900]]
    assert seconds.get_lines()[0].get_xydata().tolist() == [[16, 60]]
    found = texts(figure)
    assert {"2", "16", "rank", "zero-shot: mean", "LoRA: mean, 95 % interval", "peak memory (MiB)"} <= set(found)


def test_names_stand_side_by_side_without_a_line_between_them() -> None:
    points = [Point(name, [0.6, 0.7], PATIENTS) for name in ("full", "every_second", "max_slice")]
    figure = sweep_curve([Panel("WT", {"LoRA": points})], key="slicing", title="Dice by slicing")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["full", "every_second", "max_slice"]
    line = axes.containers[0].lines[0]
    assert line.get_xdata().tolist() == [0, 1, 2] and line.get_linestyle() == "None"


def test_costs_against_dice_by_hand() -> None:
    methods = {
        "zero-shot": Point("", [0.5, 0.6], PATIENTS, (), {"trainable_parameters": 0, "train_seconds": 0.0}),
        "LoRA": Point("", [0.7, 0.8], PATIENTS, (), {"trainable_parameters": 4_000_000, "train_seconds": 90.0}),
        "unknown": Point("", [0.7, 0.8], PATIENTS),
    }
    figure = cost_plot({"WT": methods}, title="Costs")
    parameters, seconds = figure.axes
    assert [c.lines[0].get_xydata().tolist() for c in seconds.containers] == [
        [[0, pytest.approx(0.55)]], [[90, pytest.approx(0.75)]]
    ]  # fmt: skip
    assert parameters.get_xlabel() == "parameters trained" and parameters.get_ylabel() == "Dice, WT"
    assert {"zero-shot", "LoRA"} <= set(texts(figure)) and "unknown" not in texts(figure)
