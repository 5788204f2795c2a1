"""The plots of a comparison, as files; what cannot be drawn is said and left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from medsam_lora.analysis.comparison_text import Picture, capital
from medsam_lora.analysis.costs import Group
from medsam_lora.analysis.entries import Entry, failed
from medsam_lora.analysis.wording import PREDICTION_VOLUME, REFERENCE_VOLUME, Score, method_name, region_name
from medsam_lora.errors import MedsamLoraError
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.tables import read_table
from medsam_lora.stages.compare_sweeps import cost_picture, owned, sweep_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_METHODS: Final = 16
"""Of more methods the cases are not drawn one by one."""


def draw(
    entries: Sequence[Entry],
    groups: Sequence[Group],
    scores: Sequence[Score],
    out: Path,
    bootstrap: int,
    seed: int,
    by: str | None = None,
) -> tuple[list[Picture], list[str]]:
    """Draw every plot that the tables and the files beside them allow, as SVG and PNG.

    Parameters
    ----------
    entries : sequence of Entry
        The baseline first.
    groups : sequence of Group
        The entries, those of several seeds taken together.
    scores : sequence of Score
    out : Path
    bootstrap, seed : int
        As in `compare.compare`.
    by : str, optional
        As in `compare.compare`.

    Returns
    -------
    pictures : list of Picture
        In the order in which a reader wants them.
    notes : list of str
        What was not drawn, and why; what else differs in a sweep.
    """
    from medsam_lora.analysis.figures import figure_png, figure_svg

    notes: list[str] = []
    drawn: list[tuple[Picture, Figure]] = []
    if len(entries) <= MOST_METHODS:
        drawn += [*_paired(entries, scores), *_volumes(entries)]
    else:
        notes.append(
            f"single cases and training curves of more than {MOST_METHODS} methods are not drawn: no eye tells"
        )
    for part in (
        sweep_picture(groups, by, bootstrap, seed, notes),
        cost_picture(groups, bootstrap, seed),
        _training(entries, notes) if len(entries) <= MOST_METHODS else None,
    ):
        drawn += [part] if part is not None else []
    for picture, figure in drawn:
        write_bytes_atomically(out / f"{picture.name}.svg", figure_svg(figure).encode())
        write_bytes_atomically(out / f"{picture.name}.png", figure_png(figure))
    return [picture for picture, _ in drawn], notes


def _names(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The entries by the names they have in plots, the floor first."""
    return {method_name(entry.label): entry for entry in sorted(entries, key=lambda entry: not entry.is_floor)}


def _floor_name(entries: Sequence[Entry]) -> str | None:
    return next((name for name, entry in _names(entries).items() if entry.is_floor), None)


def _regions(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(region for entry in entries for region in entry.regions))


def _paired(entries: Sequence[Entry], scores: Sequence[Score]) -> list[tuple[Picture, Figure]]:
    from medsam_lora.analysis.plots import paired_plot

    drawn = []
    for score in scores:
        for region in _regions(entries):
            mine = {name: entry for name, entry in _names(entries).items() if region in entry.regions}
            cases = list(next(iter(mine.values())).of(region))
            tables = {name: entry.of(region) for name, entry in mine.items()}
            figure = paired_plot(
                {n: [entry.number(tables[n][case], score) for case in cases] for n, entry in mine.items()},
                axis=score.axis,
                title=f"{score.title}, {region_name(region)}",
                failed={name: [failed(rows[case]) for case in cases] for name, rows in tables.items()},
                floor=_floor_name(entries),
                share=not score.unit,
            )
            caption = (
                f"{capital(score.title)}, {region_name(region)}. A line is one case: where it goes "
                f"{'up' if score.higher_is_better else 'down'}, the method to the right is better for it."
            )
            drawn.append((Picture(f"paired_{score.column}_{region}", caption), figure))
    return drawn


def _volumes(entries: Sequence[Entry]) -> list[tuple[Picture, Figure]]:
    from medsam_lora.analysis.plots import bland_altman_plot

    # A box holds far more than a tumour: its difference would hide all others on a shared axis.
    methods = [entry for entry in entries if not entry.is_floor]
    drawn = []
    for region in _regions(methods):
        volumes = {
            name: (
                [entry.number(row, REFERENCE_VOLUME) for row in entry.of(region).values()],
                [_predicted_volume(entry, row) for row in entry.of(region).values()],
            )
            for name, entry in _names(methods).items()
        }
        figure = bland_altman_plot(volumes, title=f"Volume of the {region_name(region)}")
        caption = (
            f"Bland-Altman plot of the volume of the {region_name(region)}. A point is one case; above 0 the method "
            "finds too much. The solid line is the mean difference, about 95 % of cases lie between the dashed lines."
        )
        drawn.append((Picture(f"bland_altman_{region}", caption), figure))
    return drawn


def _predicted_volume(entry: Entry, row: Mapping[str, str]) -> float:
    # A prediction that is missing has no volume; any other has one.
    return math.nan if failed(row) and not row["prediction_volume_ml"] else entry.number(row, PREDICTION_VOLUME)


def _training(entries: Sequence[Entry], notes: list[str]) -> tuple[Picture, Figure] | None:
    from medsam_lora.analysis.curves import training_curves

    logs = {}
    for name, entry in _names(entries).items():
        path = owned(entries, entry, "log.csv")
        if path is not None:
            try:
                rows = read_table(path, ("epoch",))
                _check_log(rows)
                logs[name] = rows
            except (MedsamLoraError, ValueError) as error:
                notes.append(f"the training of {name} is not drawn: {error}")
    figure = training_curves(logs)
    if figure is None:
        notes.append("training curves are not drawn: no log.csv with an epoch of training stands beside a table")
        return None
    caption = "Training: loss and Dice by epoch. Faint lines are single folds, where there are any."
    return Picture("curves", caption), figure


def _check_log(rows: Sequence[Mapping[str, str]]) -> None:
    """Every cell that is drawn is a number; ValueError where one is none."""
    for row in rows:
        int(row["epoch"])
        for column in ("loss", "train_dice", "val_dice"):
            float(row.get(column) or 0)
