"""The page's figures: training curves of every run, and the scores of every case from run to run."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medsam_lora.report.collect import Run
from medsam_lora.report.scores import rows_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


@dataclass(frozen=True)
class Figure:
    """A figure as the page holds it.

    Parameters
    ----------
    uri : str
        ``data:image/svg+xml;base64,...``: as an image, its ids and styles stay its own.
    alt, caption : str
    wide : bool
        Whether it needs the whole width of the page.
    """

    uri: str
    alt: str
    caption: str
    wide: bool = False


def figures(runs: Sequence[Run], floor: str) -> list[Figure]:
    """Draw what can be drawn: curves where something was trained, cases where two runs scored the same ones.

    Parameters
    ----------
    runs : sequence of Run
    floor : str
        Method name of the floor.
    """
    from medsam_lora.analysis.curves import training_curves

    drawn = []
    curves = training_curves({run.label: run.log for run in runs if run.log})
    if curves is not None:
        names = ", ".join(run.label for run in runs if any(row.get("loss") for row in run.log))
        text = f"Training loss, and Dice of training slices and validation cases, by epoch: {names}"
        drawn.append(_figure(curves, text, "Loss and Dice by epoch, from log.csv.", wide=True))
    for region in dict.fromkeys(region for run in runs for region in run.regions):
        figure = _cases(runs, region, floor)
        if figure is not None:
            drawn.append(figure)
    return drawn


def _cases(runs: Sequence[Run], region: str, floor: str) -> Figure | None:
    from medsam_lora.analysis.plots import paired_plot

    tables = {run.label: {row["case_id"]: row for row in rows_of(run, region)} for run in runs}
    tables = {label: rows for label, rows in tables.items() if rows}
    if len(tables) < 2:
        return None
    shared = [case for case in next(iter(tables.values())) if all(case in rows for rows in tables.values())]
    if not shared:
        return None
    scores = {label: [rows[case].number("dice") or 0.0 for case in shared] for label, rows in tables.items()}
    failed = {label: [rows[case]["status"] != "ok" for case in shared] for label, rows in tables.items()}
    name = next((run.label for run in runs if run.method == floor), None)
    figure = paired_plot(scores, axis="Dice", title=f"Dice of {region}, case by case", failed=failed, floor=name)
    return _figure(figure, f"Dice of {region} of {len(shared)} cases, by run", f"{region}: every line is a case.")


def _figure(figure: MatplotlibFigure, alt: str, caption: str, *, wide: bool = False) -> Figure:
    from medsam_lora.analysis.figures import figure_svg

    encoded = base64.b64encode(figure_svg(figure).encode()).decode("ascii")
    return Figure(f"data:image/svg+xml;base64,{encoded}", alt, caption, wide)
