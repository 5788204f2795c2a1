"""The plots of a comparison, as files; what cannot be drawn is said and left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam_lora.analysis.comparison_text import Picture, capital
from medsam_lora.analysis.entries import Entry, failed
from medsam_lora.analysis.wording import PREDICTION_VOLUME, REFERENCE_VOLUME, SCORES, Score, method_name, region_name
from medsam_lora.config import load_yaml
from medsam_lora.errors import MedsamLoraError
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.tables import read_table
from medsam_lora.peft import METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Settings:
    """What stands in the ``config.yaml`` beside a table: the method, its rank, and every other setting."""

    method: str
    rank: int
    others: Mapping[str, Any]


def draw(
    entries: Sequence[Entry], scores: Sequence[Score], out: Path, bootstrap: int, seed: int
) -> tuple[list[Picture], list[str]]:
    """Draw every plot that the tables and the files beside them allow, as SVG and PNG.

    Parameters
    ----------
    entries : sequence of Entry
        The baseline first.
    scores : sequence of Score
    out : Path
    bootstrap, seed : int
        As in `compare.compare`.

    Returns
    -------
    pictures : list of Picture
        In the order in which a reader wants them.
    notes : list of str
        What was not drawn, and why; what else differs in a rank sweep.
    """
    from medsam_lora.analysis.figures import figure_png, figure_svg

    drawn = [*_paired(entries, scores), *_volumes(entries)]
    notes: list[str] = []
    for part in (_ranks(entries, bootstrap, seed, notes), _training(entries, notes)):
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


def _owned(entries: Sequence[Entry], entry: Entry, name: str) -> Path | None:
    """A file beside an entry's table, where the table is of this one method."""
    owners = [other for other in entries if other.path == entry.path and not other.is_floor]
    path = entry.path.parent / name
    return path if len(owners) == 1 and not entry.is_floor and path.is_file() else None


def _training(entries: Sequence[Entry], notes: list[str]) -> tuple[Picture, Figure] | None:
    from medsam_lora.analysis.curves import training_curves

    logs = {}
    for name, entry in _names(entries).items():
        path = _owned(entries, entry, "log.csv")
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


def _ranks(entries: Sequence[Entry], bootstrap: int, seed: int, notes: list[str]) -> tuple[Picture, Figure] | None:
    from medsam_lora.analysis.curves import RankPanel, RankPoint, rank_curve

    sweeps = _sweeps(entries, notes)
    if not sweeps:
        notes.append("a rank sweep is not drawn: no two runs of one method differ in method.rank (config.yaml)")
        return None
    swept = {entry.label for runs in sweeps.values() for entry, _ in runs}
    level = [entry for entry in entries if entry.is_floor or (entry is entries[0] and entry.label not in swept)]
    panels = []
    for region in _regions([entry for runs in sweeps.values() for entry, _ in runs]):
        points = {}
        for method, runs in sweeps.items():
            points[method_name(method)] = [
                RankPoint(
                    settings.rank,
                    [entry.number(row, SCORES["dice"]) for row in entry.of(region).values()],
                    [row["patient_id"] for row in entry.of(region).values()],
                    _parameters(entries, entry),
                )
                for entry, settings in runs
            ]
        lines = {}
        for name, entry in _names(level).items():
            values = [entry.number(row, SCORES["dice"]) for row in entry.of(region).values()]
            if values:
                lines[name] = math.fsum(values) / len(values)
        panels.append(RankPanel(capital(region_name(region)), points, lines))
    for method, runs in sweeps.items():
        if differing := _other_differences([settings for _, settings in runs]):
            notes.append(f"the runs of {method} in the rank sweep differ in more than the rank: {', '.join(differing)}")
    figure = rank_curve(panels, title="Dice by rank", floor=_floor_name(level), bootstrap=bootstrap, seed=seed)
    caption = (
        "Rank sweep: mean Dice with its 95 % interval over patients against the rank; horizontal lines are methods "
        "without a rank. Overlapping intervals do not show equality: see the paired differences."
    )
    return Picture("rank_sweep", caption), figure


def _sweeps(entries: Sequence[Entry], notes: list[str]) -> dict[str, list[tuple[Entry, _Settings]]]:
    """Runs by the method they trained, where two of them differ in rank."""
    found: dict[str, list[tuple[Entry, _Settings]]] = {}
    for entry in entries:
        path = _owned(entries, entry, "config.yaml")
        if path is None:
            continue
        try:
            settings = _settings(load_yaml(path))
        except MedsamLoraError as error:
            notes.append(f"{entry.label} is not in a rank sweep: {error}")
            continue
        if settings is not None:
            found.setdefault(settings.method, []).append((entry, settings))
    return {method: runs for method, runs in found.items() if len({settings.rank for _, settings in runs}) > 1}


def _settings(data: Mapping[str, Any]) -> _Settings | None:
    method = data.get("method")
    if not isinstance(method, Mapping) or not isinstance(method.get("rank"), int) or method["rank"] < 1:
        return None
    name = str(method.get("name"))
    # The file holds every setting, also those that a method does not read.
    if name not in METHODS or "rank" not in METHODS[name].options:
        return None
    flat = {
        f"{section}.{key}": value
        for section, values in data.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    }
    return _Settings(name, method["rank"], {key: value for key, value in flat.items() if key != "method.rank"})


def _other_differences(runs: Sequence[_Settings]) -> list[str]:
    keys = sorted({key for run in runs for key in run.others})
    return [key for key in keys if any(run.others.get(key) != runs[0].others.get(key) for run in runs)]


def _parameters(entries: Sequence[Entry], entry: Entry) -> int | None:
    for name in ("run.json", "fold0/run.json"):
        path = _owned(entries, entry, name)
        if path is not None:
            try:
                count = json.loads(path.read_text(encoding="utf-8")).get("trainable_parameters")
            except (ValueError, AttributeError):  # not JSON, or not an object
                continue
            return count if isinstance(count, int) else None
    return None
