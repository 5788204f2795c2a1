"""The plot of training by epoch.

As in `plots`, plain numbers under the names that the reader sees become a figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from medsam_lora.analysis.figures import colour_cycle, new_figure, settled, style

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
