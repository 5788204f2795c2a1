"""The plots of a comparison: cases side by side, and volumes.

Every function takes plain numbers under the names that the reader sees, and gives a figure for `figures.figure_svg`
and `figures.figure_png`. Names are in the order of the plot; the floor is drawn in grey.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from medsam_lora.analysis.figures import FAINT, FLOOR_COLOUR, colour_cycle, new_figure, settled, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT_SDS: Final = 1.96
"""Limits of agreement lie so many standard deviations around the mean difference."""

# A distance of 374 mm stands for an empty mask; only a logarithmic axis shows it beside a few millimetres.
_FAR_MM = 100.0
# Specificity lies so near to 1 that the whole range would show one line.
_HIGH_SHARE = 0.9
_LEAST_ML = 1.0
_WRAP = 16


def paired_plot(
    scores: Mapping[str, Sequence[float]],
    *,
    axis: str,
    title: str,
    failed: Mapping[str, Sequence[bool]] | None = None,
    floor: str | None = None,
    share: bool = True,
) -> Figure:
    """Every case as a line from method to method, over box plots.

    Parameters
    ----------
    scores : mapping of str to sequence of float, length N
        By method, cases in one order.
    axis, title : str
    failed : mapping of str to sequence of bool, length N, optional
        Cases without a usable prediction, marked with a cross.
    floor : str, optional
        The name of the floor, where it is among the methods.
    share : bool
        Whether scores lie in [0, 1].

    Returns
    -------
    matplotlib.figure.Figure
        Boxes reach from quartile to quartile with the median in them, whiskers to the farthest case within 1.5 box
        lengths; the diamond is the mean.
    """
    names = list(scores)
    values = np.array([list(map(float, scores[name])) for name in names])
    colours = _colours(names, floor)
    with style():
        figure = new_figure(max(4.5, 1.5 + 1.4 * len(names)), 4.8, title)
        axes = figure.subplots()
        for at, name in enumerate(names):
            _box(axes, at, values[at], colours[name])
        faint = min(0.8, max(0.15, 12 / values.shape[1]))
        axes.plot(range(len(names)), values, color="#5A5A5A", linewidth=0.8, alpha=faint, zorder=2)
        for at, name in enumerate(names):
            lost = np.array((failed or {}).get(name, [False] * values.shape[1]), bool)
            axes.scatter(np.full((~lost).sum(), at), values[at, ~lost], s=16, color=colours[name], zorder=3)
            axes.scatter(np.full(lost.sum(), at), values[at, lost], s=30, marker="x", color="#B00020", zorder=4)
            axes.scatter([at], [values[at].mean()], s=48, marker="D", color="white", edgecolor="black", zorder=5)
        axes.set_xticks(range(len(names)), [_wrapped(name) for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.grid(False, axis="x")
        axes.set_ylabel(axis)
        if share and values.min() < _HIGH_SHARE:
            axes.set_ylim(-0.03, 1.03)
        elif values.min() >= 0 and values.max() >= _FAR_MM > 2 * float(np.median(values)):
            axes.set_yscale("symlog", linthresh=1.0)
            axes.set_ylim(-0.1, 1.4 * values.max())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        any_lost = any(any(lost) for lost in (failed or {}).values())
        _explain(axes, values.shape[1], any_lost)
        return settled(figure)


def bland_altman_plot(volumes: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str) -> Figure:
    """Difference of the predicted to the reference volume against their mean, one panel per method [1]_.

    Parameters
    ----------
    volumes : mapping of str to (reference, prediction), each of length N
        In ml. NaN where there is no prediction; such cases are left out and counted under the panel.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        With the mean difference and, from two cases on, the limits of agreement (mean ± 1.96 standard deviations).

    References
    ----------
    .. [1] J. M. Bland and D. G. Altman, "Statistical methods for assessing agreement between two methods of clinical
       measurement", The Lancet 327, 1986.
    """
    names = list(volumes)
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    with style():
        figure = new_figure(1.0 + 3.7 * columns, 0.7 + 3.7 * lines, title)
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        colours = colour_cycle(len(names))
        for at, (name, axes) in enumerate(zip(names, panels[: len(names)], strict=True)):
            _bland_altman(axes, name, volumes[name], colours[at])
            if at % columns == 0:
                axes.set_ylabel("prediction − reference (ml)")
            if at + columns >= len(names):
                axes.set_xlabel("mean of prediction and reference (ml)")
                axes.tick_params(labelbottom=True)
        low, high = panels[0].get_ylim()
        # Equal volumes would stretch the axis over roundings.
        panels[0].set_ylim(min(low, -_LEAST_ML), max(high, _LEAST_ML))
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        return settled(figure)


def _colours(names: Sequence[str], floor: str | None) -> dict[str, str]:
    others = [name for name in names if name != floor]
    colours = dict(zip(others, colour_cycle(len(others)), strict=True))
    return {name: colours.get(name, FLOOR_COLOUR) for name in names}


def _box(axes: Axes, at: int, values: np.ndarray, colour: str) -> None:
    parts = axes.boxplot(
        [values], positions=[at], widths=0.5, showfliers=False, patch_artist=True, manage_ticks=False, zorder=1
    )
    for box in parts["boxes"]:
        box.set(facecolor=colour, alpha=0.25, edgecolor="none")
    for line in (*parts["medians"], *parts["whiskers"], *parts["caps"]):
        line.set(color=colour, linewidth=1.5)


def _explain(axes: Axes, n: int, any_lost: bool) -> None:
    from matplotlib.lines import Line2D

    marks: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black"}
    handles = [
        Line2D([], [], color="#5A5A5A", linewidth=0.8, marker="o", markersize=4, label=f"one case (of {n})"),
        Line2D([], [], marker="D", markerfacecolor="white", label="mean", **marks),
        Line2D([], [], color="#5A5A5A", linewidth=1.5, label="median, in the box of quartiles"),
    ]
    if any_lost:
        handles.append(Line2D([], [], marker="x", color="#B00020", linestyle="none", label="no usable prediction"))
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)


def _wrapped(name: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, _WRAP, break_on_hyphens=False)) or name


def _bland_altman(axes: Axes, name: str, volumes: tuple[Sequence[float], Sequence[float]], colour: str) -> None:
    reference, prediction = (np.asarray(v, float) for v in volumes)
    known = np.isfinite(reference) & np.isfinite(prediction)
    gaps = (prediction - reference)[known]
    lost = int((~known).sum())
    note = f"{gaps.size} cases" + (f", {lost} without a prediction" if lost else "")
    axes.axhline(0, color=FAINT, linewidth=1)
    if gaps.size:
        axes.scatter(((prediction + reference) / 2)[known], gaps, s=18, color=colour, zorder=3)
        mean = float(gaps.mean())
        axes.axhline(mean, color=colour, linewidth=1.5)
        note += f"\nmean difference {_signed(mean)} ml"
    if gaps.size > 1:
        spread = LIMIT_SDS * float(gaps.std(ddof=1))
        for limit in (mean - spread, mean + spread):
            axes.axhline(limit, color=colour, linewidth=1, linestyle="--")
        note += f"\nlimits of agreement {_signed(mean - spread)} to {_signed(mean + spread)} ml"
    axes.set_title(f"{name}\n{note}", fontsize=9)


def _signed(value: float) -> str:
    """A number with its sign, a zero without.

    Examples
    --------
    >>> _signed(1.26), _signed(-0.01)
    ('+1.3', '0.0')
    """
    return f"{value:+.1f}" if round(value, 1) else "0.0"
