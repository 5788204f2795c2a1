"""The plots of runs: training by epoch, and scores by rank.

As in `plots`, plain numbers under the names that the reader sees become figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from medsam_lora.analysis.figures import COLOURS, FLOOR_COLOUR, colour_cycle, new_figure, settled, style
from medsam_lora.analysis.statistics import bootstrap_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def training_curves(logs: Mapping[str, Sequence[Mapping[str, str]]]) -> Figure | None:
    """Loss and Dice by epoch: a faint line per fold and their mean.

    Parameters
    ----------
    logs : mapping of str to sequence of mapping
        Rows of ``log.csv`` by method: ``epoch``, ``loss``, ``train_dice``, ``val_dice``, and ``fold`` where there are
        folds. Cells may be empty.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no method was trained for an epoch.
    """
    trained = {name: rows for name, rows in logs.items() if any(row.get("loss") for row in rows)}
    if not trained:
        return None
    with style():
        figure = new_figure(10, 4.4, "Training")
        left, right = figure.subplots(1, 2)
        for (name, rows), colour in zip(trained.items(), colour_cycle(len(trained)), strict=True):
            _curve(left, rows, "loss", colour, label=name)
            _curve(right, rows, "val_dice", colour)
            _curve(right, rows, "train_dice", colour, dashed=True)
        left.set_ylabel("training loss (lower is better)")
        right.set_ylabel("Dice (higher is better)")
        right.set_ylim(-0.03, 1.03)
        for axes in (left, right):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        right.set_title("solid: validation cases, whole volumes; dashed: training slices", fontsize=9)
        if any(row.get("fold") for rows in trained.values() for row in rows):
            left.set_title("faint: single folds; strong: their mean, as far as every fold went", fontsize=9)
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        return settled(figure)


@dataclass(frozen=True)
class RankPoint:
    """A run of a rank sweep.

    Parameters
    ----------
    rank : int
    scores : sequence of float, length N
        Dice per case.
    patients : sequence of str, length N
    parameters : int, optional
        Parameters trained.
    """

    rank: int
    scores: Sequence[float]
    patients: Sequence[str]
    parameters: int | None = None


@dataclass(frozen=True)
class RankPanel:
    """One region of a rank sweep.

    Parameters
    ----------
    title : str
    sweeps : mapping of str to sequence of RankPoint
        By method.
    lines : mapping of str to float
        Mean Dice of what has no rank: baseline, floor.
    """

    title: str
    sweeps: Mapping[str, Sequence[RankPoint]]
    lines: Mapping[str, float] = field(default_factory=dict)


def rank_curve(
    panels: Sequence[RankPanel], *, title: str, floor: str | None = None, bootstrap: int = 2000, seed: int = 0
) -> Figure:
    """Mean Dice with its bootstrap interval against the rank, one panel per region.

    Parameters
    ----------
    panels : sequence of RankPanel
    title : str
    floor : str, optional
        Which of the lines is the floor.
    bootstrap, seed : int
        As in `statistics.bootstrap_mean`.
    """
    with style():
        figure = new_figure(1.2 + 4.4 * len(panels), 4.8, title)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            for (name, points), colour in zip(panel.sweeps.items(), colour_cycle(len(panel.sweeps)), strict=True):
                ordered = sorted(points, key=lambda point: point.rank)
                stats = [bootstrap_mean(point.scores, point.patients, bootstrap, seed) for point in ordered]
                means = np.array([mean for mean, _, _ in stats])
                spans = np.array([[mean - low, high - mean] for mean, low, high in stats]).T
                ranks = [point.rank for point in ordered]
                # An interval of a bootstrap may by a rounding begin above its mean.
                label = f"{name}: mean, 95 % interval"
                axes.errorbar(
                    ranks, means, np.maximum(spans, 0), color=colour, marker="o", capsize=3, zorder=3, label=label
                )
            others = list(COLOURS[len(panel.sweeps) :]) or list(COLOURS)
            for at, (name, mean) in enumerate(panel.lines.items()):
                colour = FLOOR_COLOUR if name == floor else others[at % len(others)]
                axes.axhline(mean, color=colour, linestyle="--" if name != floor else ":", label=f"{name}: mean")
            _rank_axis(axes, panel)
            axes.set_title(panel.title, fontsize=10)
            axes.set_ylim(-0.03, 1.03)
        # Panels have the same methods, save where the floor lacks a region.
        known = {n: h for axes in figure.axes for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=2, fontsize=8)
        figure.axes[0].set_ylabel("Dice (higher is better)")
        return settled(figure)


def _rank_axis(axes: Axes, panel: RankPanel) -> None:
    points = [point for points in panel.sweeps.values() for point in points]
    ranks = sorted({point.rank for point in points})
    axes.set_xscale("log", base=2)
    labels = []
    for rank in ranks:
        trained = {point.parameters for point in points if point.rank == rank} - {None}
        # Methods of one rank may train different numbers of parameters.
        counts = ", ".join(_short(n) for n in sorted(n for n in trained if n is not None))
        labels.append(f"{rank}\n{counts}" if counts else str(rank))
    axes.set_xticks(ranks, labels)
    axes.minorticks_off()
    axes.set_xlim(ranks[0] / 1.4, ranks[-1] * 1.4)
    below = any(point.parameters is not None for point in points)
    axes.set_xlabel("rank" + ("; below it, parameters trained" if below else ""))


def _short(count: int) -> str:
    """A count in thousands or millions, to three digits: ranks differ little where a decoder is trained as well.

    Examples
    --------
    >>> _short(640), _short(73_728), _short(4_212_000)
    ('640', '73.7 k', '4.21 M')
    """
    if count < 1000:
        return str(count)
    return f"{count / 1000:.3g} k" if count < 999_500 else f"{count / 1e6:.3g} M"


def _curve(
    axes: Axes,
    rows: Sequence[Mapping[str, str]],
    column: str,
    colour: str,
    dashed: bool = False,
    label: str | None = None,
) -> None:
    folds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get(column):
            folds.setdefault(row.get("fold", ""), {})[int(row["epoch"])] = float(row[column])
    if not folds:
        return
    line = "--" if dashed else "-"
    if len(folds) > 1:
        for values in folds.values():
            axes.plot(list(values), list(values.values()), color=colour, linewidth=0.8, alpha=0.3, linestyle=line)
    # Where a fold stopped early the mean ends: one over those that went on would be of other folds.
    epochs = sorted(set.intersection(*(set(values) for values in folds.values())))
    means = [float(np.mean([values[epoch] for values in folds.values()])) for epoch in epochs]
    mark = "o" if len(epochs) == 1 else ""
    axes.plot(epochs, means, color=colour, linewidth=1.8, linestyle=line, marker=mark, label=label)
