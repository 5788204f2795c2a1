"""What stands beside the tables of a comparison, and the plots of it: a setting that was swept, and what runs cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from medsam_lora.analysis.comparison_text import Picture, capital
from medsam_lora.analysis.costs import COSTS, SEED, Facts, Group, of_all
from medsam_lora.analysis.entries import Entry
from medsam_lora.analysis.wording import method_name, region_name
from medsam_lora.config import Config, build_config, load_yaml
from medsam_lora.errors import MedsamLoraError
from medsam_lora.stages.relevance import reads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from medsam_lora.analysis.sweeps import Point

RANK: Final = "method.rank"
_MOST_LINES = 6
_MOST_SERIES = 8


def owned(entries: Sequence[Entry], entry: Entry, name: str) -> Path | None:
    """A file beside an entry's table, where the table is of this one method."""
    owners = [other for other in entries if other.path == entry.path and not other.is_floor]
    path = entry.path.parent / name
    return path if len(owners) == 1 and not entry.is_floor and path.is_file() else None


def read_facts(entries: Sequence[Entry], notes: list[str]) -> dict[str, Facts]:
    """Settings (``config.yaml``) and costs (``run.json``, of every fold) of the entries, by label.

    Parameters
    ----------
    entries : sequence of Entry
    notes : list of str
        Gains what could not be read.
    """
    found = {}
    for entry in entries:
        path = owned(entries, entry, "config.yaml")
        settings: dict[str, Any] = {}
        if path is not None:
            try:
                settings = _flat(load_yaml(path))
            except MedsamLoraError as error:
                notes.append(f"{entry.label} is not in a rank sweep: {error}")
        found[entry.label] = Facts(settings, _costs(entries, entry))
    return found


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in data.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    }


def _costs(entries: Sequence[Entry], entry: Entry) -> dict[str, float]:
    folds = entry.path.parent.glob("fold*/run.json")
    names = ["run.json", *sorted(str(path.relative_to(entry.path.parent)) for path in folds)]
    records = []
    for path in (owned(entries, entry, name) for name in names):
        if path is None:
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # not JSON: its costs are not known
            continue
        if isinstance(record, dict):
            records.append(record)
    costs = {}
    for name in COSTS:
        values = [record[name] for record in records if isinstance(record.get(name), int | float)]
        if values and len(values) == len(records):
            costs[name] = of_all(name, values)
    return costs


def sweep_picture(
    groups: Sequence[Group], by: str | None, bootstrap: int, seed: int, notes: list[str]
) -> tuple[Picture, Figure] | None:
    """Dice, and what the runs cost, against a setting.

    Parameters
    ----------
    groups : sequence of Group
        The baseline first.
    by : str or None
        ``section.key`` of the setting; None takes the rank, where it differs.
    bootstrap, seed : int
        As in `compare.compare`.
    notes : list of str
        Gains what was not drawn, and what else differs.
    """
    from medsam_lora.analysis.sweeps import Panel, sweep_curve

    key = RANK if by is None else by
    series = _series(groups, key, notes)
    if not series:
        what = "a rank sweep" if by is None else f"the sweep of {key}"
        notes.append(f"{what} is not drawn: no two runs of one method differ in {key} (config.yaml)")
        return None
    swept = {group.label for members in series.values() for group in members}
    level = [group for group in groups if group.label not in swept]
    # All lines tell as little as none: what a sweep is read against is the floor and what comes first.
    lines = [group for group in level if group.entries[0].is_floor] or []
    lines = [*[group for group in level if group not in lines][: _MOST_LINES - len(lines)], *lines]
    first = next(iter(series.values()))[0]
    panels = []
    for region in first.entries[0].regions:
        means = {
            method_name(group.label): float(np.mean(group.scores(region)[0]))
            for group in lines
            if region in group.entries[0].regions
        }
        points = {name: [_point(group, region, key) for group in members] for name, members in series.items()}
        panels.append(Panel(capital(region_name(region)), points, means))
    name = key.partition(".")[2] if key.partition(".")[2] != "name" else key.partition(".")[0]
    floor = next((method_name(group.label) for group in lines if group.entries[0].is_floor), None)
    title = f"Dice by {name}"
    figure = sweep_curve(panels, key=name, title=title, floor=floor, bootstrap=bootstrap, seed=seed)
    caption = (
        f"{'Rank sweep' if key == RANK else 'Sweep'}: mean Dice with its 95 % interval over patients against "
        f"{'the rank' if key == RANK else key}, and below it what the runs cost; horizontal lines are methods without "
        "it. Bars without an interval are the means of single seeds. Overlapping intervals do not show equality: see "
        "the paired differences."
    )
    return Picture("rank_sweep" if by is None else "sweep", caption), figure


def cost_picture(groups: Sequence[Group], bootstrap: int, seed: int) -> tuple[Picture, Figure] | None:
    """Dice against parameters, memory and time; None where they are known of fewer than two methods."""
    from medsam_lora.analysis.sweeps import COST_AXES, cost_plot

    known = [g for g in groups if any(g.cost(name) is not None for name in COST_AXES)]
    if len(known) < 2:
        return None
    points = {
        region: {method_name(g.label): _point(g, region) for g in known if region in g.entries[0].regions}
        for region in known[0].entries[0].regions
    }
    figure = cost_plot(points, title="Dice against what the runs cost", bootstrap=bootstrap, seed=seed)
    caption = (
        "Dice with its 95 % interval over patients against the parameters trained, the peak memory and the time of "
        "training. To the upper left is better. Memory and time are of the machine that trained."
    )
    return Picture("costs", caption), figure


def _point(group: Group, region: str, key: str | None = None) -> Point:
    from medsam_lora.analysis.sweeps import COST_AXES, Point

    costs = {name: value for name in COST_AXES if (value := group.cost(name)) is not None}
    place = group.label if key is None else _plain(group.settings[key])
    return Point(place, *group.scores(region), group.seed_means(region), costs)


def _plain(value: Any) -> Any:
    """A setting as a place on an axis: a number, or what stands in the file."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else json.dumps(value).strip('"')


def _series(groups: Sequence[Group], key: str, notes: list[str]) -> dict[str, list[Group]]:
    """Groups by the method they trained, and by the settings that differ where the swept one does not.

    Methods with one value of the key are no sweep. What differs along with the key stays in a series, and is noted.
    """
    by_method: dict[str, list[Group]] = {}
    for group in groups:
        config = None if not group.settings or group.entries[0].is_floor else _config(group, notes)
        if config is not None and key in group.settings and reads(config, key):
            # Where the methods themselves are swept, they are one series.
            method = "" if key == "method.name" else config.method.name
            by_method.setdefault(method, []).append(group)
    found: dict[str, list[Group]] = {}
    for method, members in by_method.items():
        if len({repr(group.settings[key]) for group in members}) < 2:
            continue
        inner = _differing_at_one_value(members, key)
        split: dict[str, list[Group]] = {}
        for group in members:
            told = [f"{k.partition('.')[2]} {_plain(group.settings.get(k))}" for k in inner]
            split.setdefault(", ".join([method_name(method), *told] if method else told or ["methods"]), []).append(
                group
            )
        if len(split) > _MOST_SERIES:
            # A study tries values of its own in every run: no two of them make a curve.
            inner, split = [], {method_name(method) or "methods": members}
        found |= split
        others = [k for k in _differing(members) if k not in (key, SEED, *inner)]
        if others:
            of = f"the runs of {method}" if method else "the runs"
            what = "the rank" if key == RANK else key
            sweep = "the rank sweep" if key == RANK else "the sweep"
            notes.append(f"{of} in {sweep} differ in more than {what}: {', '.join(others)}")
    return found


def _config(group: Group, notes: list[str]) -> Config | None:
    """The settings as a configuration; None, and a note, where they are not those of this version."""
    data: dict[str, dict[str, Any]] = {}
    for name, value in group.settings.items():
        section, _, key = name.partition(".")
        data.setdefault(section, {})[key] = value
    try:
        config = build_config(data)
        reads(config, RANK)
    except MedsamLoraError as error:
        notes.append(f"{group.label} is in no sweep: {error.message}")
        return None
    return config


def _differing(groups: Sequence[Group]) -> list[str]:
    keys = sorted({key for group in groups for key in group.settings})
    return [key for key in keys if len({repr(group.settings.get(key)) for group in groups}) > 1]


def _differing_at_one_value(groups: Sequence[Group], key: str) -> list[str]:
    """The settings in which groups differ that have the same value of the key."""
    keys: set[str] = set()
    for value in {repr(group.settings[key]) for group in groups}:
        keys |= set(_differing([group for group in groups if repr(group.settings[key]) == value]))
    return sorted(keys - {key, SEED})
