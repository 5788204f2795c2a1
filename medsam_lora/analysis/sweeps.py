"""The plots of a sweep: scores and costs against a setting, and scores against costs.

As in `plots`, plain numbers under the names that the reader sees become figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from medsam_lora.analysis.figures import COLOURS, FLOOR_COLOUR, colour_cycle, new_figure, settled, style
from medsam_lora.analysis.statistics import bootstrap_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COST_AXES: Final[Mapping[str, str]] = {
    "trainable_parameters": "parameters trained",
    "peak_memory_mib": "peak memory (MiB)",
    "train_seconds": "training time (s)",
}
"""The costs that are drawn, and what their axes say."""

# From here on values are so far apart that equal factors deserve equal room.
_LOGARITHMIC = 4.0
_MARKERS: Final = "osD^vPX*"


@dataclass(frozen=True)
class Point:
    """A setting of a sweep, over all its seeds.

    Parameters
    ----------
    value : number or str
        Of the key that is swept; a name where there is none.
    scores : sequence of float, length N
        Dice per case.
    patients : sequence of str, length N
    seed_means : sequence of float
        Mean Dice of every seed.
    costs : mapping of str to float
        By `COST_AXES`, as far as they are known.
    """

    value: Any
    scores: Sequence[float]
    patients: Sequence[str]
    seed_means: Sequence[float] = ()
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One region of a sweep.

    Parameters
    ----------
    title : str
    series : mapping of str to sequence of Point
        By what they have in common, such as the method.
    lines : mapping of str to float
        Mean Dice of what the setting has no say in: zero-shot, floor.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    lines: Mapping[str, float] = field(default_factory=dict)


def sweep_curve(
    panels: Sequence[Panel], *, key: str, title: str, floor: str | None = None, bootstrap: int = 2000, seed: int = 0
) -> Figure:
    """Mean Dice with its bootstrap interval against a setting, one panel per region; below, what the runs cost.

    Parameters
    ----------
    panels : sequence of Panel
        Costs are taken from the first.
    key : str
        What the axis is called.
    title : str
    floor : str, optional
        Which of the lines is the floor.
    bootstrap, seed : int
        As in `statistics.bootstrap_mean`.
    """
    axis = _Axis(key, [point.value for panel in panels for points in panel.series.values() for point in points])
    everything = [point for points in panels[0].series.values() for point in points]
    costs = [name for name in COST_AXES if any(name in point.costs for point in everything)]
    with style():
        figure = new_figure(max(1.2 + 4.4 * len(panels), 2.8 * len(costs) + 1.2), 4.8 + 2.6 * bool(costs), title)
        wide = len(panels) * max(len(costs), 1)
        grid = figure.add_gridspec(1 + bool(costs), wide, height_ratios=[1.7, 1] if costs else [1])
        first = None
        for at, panel in enumerate(panels):
            span = wide // len(panels)
            axes = figure.add_subplot(grid[0, at * span : (at + 1) * span], sharey=first)
            first = first or axes
            _scores(axes, panel, axis, floor, bootstrap, seed)
        first = first or figure.axes[0]
        first.set_ylabel("Dice (higher is better)")
        for at, name in enumerate(costs):
            span = wide // len(costs)
            _costs(figure.add_subplot(grid[1, at * span : (at + 1) * span]), panels[0], axis, name)
        # Panels have the same methods, save where the floor lacks a region.
        known = {n: h for axes in figure.axes for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=2, fontsize=8)
        return settled(figure)


def cost_plot(points: Mapping[str, Mapping[str, Point]], *, title: str, bootstrap: int = 2000, seed: int = 0) -> Figure:
    """Mean Dice with its interval against parameters, memory and time, a row of panels for each region.

    Parameters
    ----------
    points : mapping of str to mapping of str to Point
        By region, then by method; methods in one order. A cost that is not known of a point leaves it out of a panel.
    title : str
    bootstrap, seed : int
        As in `statistics.bootstrap_mean`.
    """
    everything = [point for methods in points.values() for point in methods.values()]
    costs = [name for name in COST_AXES if any(name in point.costs for point in everything)]
    names = list(dict.fromkeys(name for methods in points.values() for name in methods))
    looks = {
        name: (colour, _MARKERS[at // len(COLOURS) % len(_MARKERS)])
        for at, (name, colour) in enumerate(zip(names, colour_cycle(len(names)), strict=True))
    }
    with style():
        figure = new_figure(1.2 + 3.6 * len(costs), 1.4 + 3.2 * len(points) + 0.1 * len(names), title)
        grid = figure.subplots(len(points), len(costs), squeeze=False, sharey=True, sharex="col")
        for row, (line, (region, methods)) in enumerate(zip(grid, points.items(), strict=True), 1):
            for axes, cost in zip(line, costs, strict=True):
                for name, point in methods.items():
                    if cost in point.costs:
                        _dot(axes, point.costs[cost], point, looks[name], name, bootstrap, seed)
                _cost_scale(axes, [point.costs[cost] for point in methods.values() if cost in point.costs])
                if row == len(points):
                    axes.set_xlabel(COST_AXES[cost])
            line[0].set_ylabel(f"Dice, {region}")
        known = {n: h for axes in figure.axes for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=3, fontsize=8)
        return settled(figure)


class _Axis:
    """Where values stand on the axis of a sweep: numbers at their place, names one beside the other."""

    def __init__(self, key: str, values: Sequence[Any]) -> None:
        self.key = key
        distinct = list(dict.fromkeys(values))
        self.numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in distinct)
        self.values = sorted(distinct) if self.numeric else distinct
        self.logarithmic = self.numeric and self.values[0] > 0 and self.values[-1] >= _LOGARITHMIC * self.values[0]

    def place(self, value: Any) -> float:
        return value if self.numeric else self.values.index(value)

    def line(self, places: Sequence[float]) -> str:
        """Numbers are joined, where each comes once; names have nothing between them."""
        return "-" if self.numeric and len(set(places)) == len(places) else "none"

    def dress(self, axes: Axes) -> None:
        if self.logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_xlim(self.values[0] / 1.4, self.values[-1] * 1.4)
        elif not self.numeric:
            axes.set_xlim(-0.5, len(self.values) - 0.5)
        turned = not self.numeric and max(len(str(value)) for value in self.values) > 6
        labels = [f"{value:g}" if self.numeric else str(value) for value in self.values]
        axes.set_xticks([self.place(value) for value in self.values], labels, rotation=25 if turned else 0)
        axes.minorticks_off()
        axes.set_xlabel(self.key)


def _scores(axes: Axes, panel: Panel, axis: _Axis, floor: str | None, bootstrap: int, seed: int) -> None:
    for (name, points), colour in zip(panel.series.items(), colour_cycle(len(panel.series)), strict=True):
        ordered = sorted(points, key=lambda point: axis.place(point.value))
        stats = [bootstrap_mean(point.scores, point.patients, bootstrap, seed) for point in ordered]
        means = np.array([mean for mean, _, _ in stats])
        spans = np.array([[mean - low, high - mean] for mean, low, high in stats]).T
        at = [axis.place(point.value) for point in ordered]
        label = f"{name}: mean, 95 % interval"
        line = axis.line(at)
        # An interval of a bootstrap may by a rounding begin above its mean.
        spans = np.maximum(spans, 0)
        axes.errorbar(at, means, spans, color=colour, marker="o", linestyle=line, capsize=3, zorder=3, label=label)
        for place, point in zip(at, ordered, strict=True):
            if len(point.seed_means) > 1:
                axes.scatter(
                    [place] * len(point.seed_means),
                    point.seed_means,
                    marker="_",
                    s=90,
                    color="black",
                    linewidths=1.0,
                    zorder=4,
                    label="mean of a single seed",
                )
    others = list(COLOURS[len(panel.series) :]) or list(COLOURS)
    for at_line, (name, mean) in enumerate(panel.lines.items()):
        colour = FLOOR_COLOUR if name == floor else others[at_line % len(others)]
        axes.axhline(mean, color=colour, linestyle="--" if name != floor else ":", label=f"{name}: mean")
    axis.dress(axes)
    axes.set_title(panel.title, fontsize=10)
    axes.set_ylim(-0.03, 1.03)


def _costs(axes: Axes, panel: Panel, axis: _Axis, cost: str) -> None:
    for points, colour in zip(panel.series.values(), colour_cycle(len(panel.series)), strict=True):
        known = sorted((p for p in points if cost in p.costs), key=lambda point: axis.place(point.value))
        at, values = [axis.place(point.value) for point in known], [point.costs[cost] for point in known]
        axes.plot(at, values, color=colour, marker="o", markersize=4, linestyle=axis.line(at))
    axis.dress(axes)
    # From zero, so that a large cost looks large; what costs the same looks the same.
    axes.set_ylim(0, 1.1 * max(point.costs.get(cost, 0) for points in panel.series.values() for point in points) or 1)
    axes.yaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.set_title(COST_AXES[cost], fontsize=9)


def _dot(axes: Axes, at: float, point: Point, look: tuple[str, str], name: str, bootstrap: int, seed: int) -> None:
    mean, low, high = bootstrap_mean(point.scores, point.patients, bootstrap, seed)
    span = np.maximum([[mean - low], [high - mean]], 0)
    axes.errorbar([at], [mean], span, color=look[0], marker=look[1], linestyle="none", capsize=2, label=name)


def _cost_scale(axes: Axes, values: Sequence[float]) -> None:
    positive = [value for value in values if value > 0]
    left = -0.03 * max(positive, default=1)
    if positive and max(positive) >= 10 * min(positive):
        # Zero-shot trains nothing: it keeps its place at the left end.
        axes.set_xscale("symlog", linthresh=min(positive))
        left = -0.3 * min(positive)
    axes.set_xlim(left=left, right=1.15 * max(positive, default=1))
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))


def short_count(count: float) -> str:
    """A count in thousands or millions, to three digits: ranks differ little where a decoder is trained as well.

    Examples
    --------
    >>> short_count(640), short_count(73_728), short_count(4_212_000), short_count(2.5)
    ('640', '73.7 k', '4.21 M', '2.5')
    """
    if count < 1000:
        return f"{count:.3g}"
    return f"{count / 1000:.3g} k" if count < 999_500 else f"{count / 1e6:.3g} M"
