"""What goes into the page: the collected runs turned into the variables of the template."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medsam_lora import __version__
from medsam_lora.io.files import sha256_of
from medsam_lora.labels import MODALITIES, REGION_COLOURS, REGION_NAMES, REGIONS
from medsam_lora.prompts import REFERENCE_BOX
from medsam_lora.report.cases import REGION_BITS
from medsam_lora.report.collect import Row, Run, Source
from medsam_lora.report.figures import Figure
from medsam_lora.report.html import CASE_COLUMNS, css_colour
from medsam_lora.report.pictures import Still
from medsam_lora.report.record import facts
from medsam_lora.report.scores import HeadlineRow, Interval, Number, cell, count, extremes, headline
from medsam_lora.report.volumes import PackedCase

FIRST_MODALITY = "t2f"
"""Shown first: whole tumour is best seen on FLAIR."""


@dataclass(frozen=True)
class Tile:
    """A number in large letters."""

    what: str
    interval: Interval
    signed: bool = False
    won: Number | None = None
    pairs: Number | None = None


@dataclass
class Page:
    """Everything the page is made of.

    Parameters
    ----------
    runs : list of Run
    sources : list of Source
    floor : str
        Method name of the floor.
    title : str
    bootstrap, seed : int
    cases : list of PackedCase
        For the viewer; empty without one.
    stills : dict of str to list of Still
        By case.
    figures : list of Figure
    notices : list of str
    manifests : list of Path
    """

    runs: list[Run]
    sources: list[Source]
    floor: str
    title: str
    bootstrap: int
    seed: int
    cases: list[PackedCase] = field(default_factory=list)
    stills: dict[str, list[Still]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    manifests: list[Path] = field(default_factory=list)

    @property
    def last(self) -> Run:
        """The run whose worst and best cases are shown: the last that is not the floor, which others lead up to."""
        return next((run for run in reversed(self.runs) if run.method != self.floor), self.runs[-1])

    @property
    def region(self) -> str:
        """The region that worst and best go by: the whole tumour where it was scored."""
        return "WT" if "WT" in self.last.regions else self.last.regions[0]

    def extreme_rows(self) -> tuple[list[Row], list[Row]]:
        """The worst and the best cases of the last run."""
        return extremes(self.last, self.region)


def content(page: Page) -> dict[str, Any]:
    """The variables of ``report.html.j2``, in plain data.

    Parameters
    ----------
    page : Page
    """
    runs = page.runs
    rows = [row for run in runs for row in run.rows]
    table = headline(runs, page.floor, page.bootstrap, page.seed)
    regions = list(dict.fromkeys(row["region"] for row in rows))
    shown = {case.about["id"] for case in page.cases}
    reference = next((run.label for run in runs if run.method != page.floor), None)
    floors = {row.region: row.scores["dice"].mean.value for row in table if row.is_floor}
    worst, best = page.extreme_rows()
    keys, records = _records(page)
    return {
        "title": page.title,
        "version": __version__,
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": runs,
        "n_cases": count("cases/case_id", len({row["case_id"] for row in rows})),
        "n_patients": count("patients/patient_id", len({row["patient_id"] for row in rows})),
        "meaning": _meaning(rows),
        "notices": page.notices,
        "tiles": _tiles(page, table),
        "headline": table,
        "floor": page.floor,
        "floor_means": {region: floors.get(region) for region in regions},
        "reference_label": reference,
        "bootstrap": page.bootstrap,
        "seed": page.seed,
        "challenge": ", ".join(dict.fromkeys(c for row in rows if (c := row.cells.get("challenge")))),
        "region_names": "; ".join(f"{r}: {REGION_NAMES[r].lower()}" for r in regions if r in REGION_NAMES) + ".",
        "regions": regions,
        "columns": [c for c in CASE_COLUMNS if any(row.cells.get(c.name) for row in rows)],
        "case_rows": _case_rows(runs, shown),
        "viewer": _viewer(page, regions) if page.cases else None,
        "viewer_regions": {r: REGION_NAMES[r] for r in REGIONS if r in regions},
        "modalities": _modalities(page.cases),
        "first_modality": next((m for m in (FIRST_MODALITY, *MODALITIES) if m in _modalities(page.cases)), ""),
        "blobs": {key: text for case in page.cases for key, text in case.blobs.items()},
        "last_label": page.last.label,
        "extreme_region": page.region,
        "worst": [_extreme(page, row, shown) for row in worst],
        "best": [_extreme(page, row, shown) for row in best],
        "figures": page.figures,
        "records": records,
        "sources": [*page.sources, *keys],
    }


def _meaning(rows: Sequence[Row]) -> str:
    sources = {row["prompt_source"] for row in rows}
    if REFERENCE_BOX not in sources:
        return f"Box prompts: {', '.join(sorted(sources))}."
    return (
        "The box prompts were taken from the reference (reference_box): a score here says how well a box is filled, "
        "not how well a tumour is found."
    )


def _tiles(page: Page, table: Sequence[HeadlineRow]) -> list[Tile]:
    region, label = page.region, page.last.label
    mine = next(row for row in table if row.label == label and row.region == region)
    tiles = [Tile(f"{label}: mean Dice, {region}", mine.scores["dice"])]
    if mine.difference is not None:
        first = next(row.label for row in table if row.is_reference)
        gap = mine.difference
        tiles.append(Tile(f"{label} against {first}: difference in Dice, {region}", gap.dice, True, gap.won, gap.pairs))
    tiles += [
        Tile(f"the floor, the box filled: mean Dice, {region}", row.scores["dice"])
        for row in table
        if row.is_floor and row.region == region
    ]
    return tiles


def _case_rows(runs: Iterable[Run], shown: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "case_id": row["case_id"],
            "patient_id": row["patient_id"],
            "label": run.label,
            "region": row["region"],
            "prompt_source": row["prompt_source"],
            "status": row["status"],
            "numbers": {column.name: cell(row, column.name) for column in CASE_COLUMNS},
            "opens": row["case_id"] in shown,
        }
        for run in runs
        for row in run.rows
    ]


def _extreme(page: Page, row: Row, shown: set[str]) -> dict[str, Any]:
    return {
        "case_id": row["case_id"],
        "dice": cell(row, "dice"),
        "reference_ml": cell(row, "reference_volume_ml"),
        "prediction_ml": cell(row, "prediction_volume_ml"),
        "status": row["status"],
        "stills": page.stills.get(row["case_id"], []),
        "opens": row["case_id"] in shown,
    }


def _viewer(page: Page, regions: Sequence[str]) -> dict[str, Any]:
    drawn = [region for region in REGIONS if region in regions]
    return {
        "cases": [case.about for case in page.cases],
        "bits": {region: REGION_BITS[region] for region in drawn},
        "colours": {region: css_colour(REGION_COLOURS[region]) for region in drawn},
        "rgb": {region: [round(255 * part) for part in REGION_COLOURS[region]] for region in drawn},
    }


def _modalities(cases: Sequence[PackedCase]) -> list[str]:
    return [name for name in MODALITIES if any(name in case.about["modalities"] for case in cases)]


def _records(page: Page) -> tuple[list[Source], list[dict[str, Any]]]:
    found = [record for run in page.runs for record in (*run.training, *run.prediction)]
    keys = {record.path: f"r{i}" for i, record in enumerate(found)}
    used: list[Source] = []
    records: list[dict[str, Any]] = []
    for run in page.runs:
        if run.method == page.floor and not run.training and not run.prediction:
            continue
        records.append({"label": run.label, "facts": facts(run, keys, page.manifests), "settings": run.settings})
        used += [Source(keys[r.path], r.path, sha256_of(r.path)) for r in (*run.training, *run.prediction)]
    return used, records


def used_cases(runs: Sequence[Run]) -> list[str]:
    """Ids of all cases that the runs scored, in the order of their tables."""
    return list(dict.fromkeys(row["case_id"] for run in runs for row in run.rows))
