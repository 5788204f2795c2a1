"""One picture of a pipeline's test cases: the largest tumour slice, the reference, the box, and every method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam_lora.analysis.overlays import Colour, Panel, mosaic
from medsam_lora.geometry import place as place_on
from medsam_lora.io.case import read_case
from medsam_lora.io.files import write_bytes_atomically
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.nifti import read_label_map
from medsam_lora.io.tables import read_table
from medsam_lora.labels import region_mask
from medsam_lora.prompts.sources import fill_boxes, read_box_table
from medsam_lora.records import CaseRecord
from medsam_lora.stages.scoring import FLOOR
from medsam_lora.transforms.orientation import oriented

if TYPE_CHECKING:
    from medsam_lora.stages.workplace import Workplace

REFERENCE_COLOUR: Colour = (80, 220, 100)
BOX_COLOUR: Colour = (90, 150, 255)
PREDICTION_COLOUR: Colour = (255, 150, 30)

MOST_CASES = 4
# The modalities in which whole tumour is best seen: oedema on FLAIR, enhancement on T1 with contrast.
_PREFERRED = ("t2f", "t1c", "t2w", "t1n")


def write_overview(place: Workplace, labels: Sequence[str]) -> Path | None:
    """Write ``overview.png``.

    Parameters
    ----------
    place : Workplace
    labels : sequence of str
        Methods in the order of their columns; the floor among them.

    Returns
    -------
    Path or None
        None where there is nothing to show.
    """
    rows: list[list[Panel]] = []
    for fold, manifest in place.fold_manifests():
        for record in read_manifest(manifest):
            if record.split == "test" and len(rows) < MOST_CASES:
                row = _case_row(place, record, fold, labels)
                if row:
                    rows.append(row)
    if not rows:
        return None
    legend = {"reference": REFERENCE_COLOUR, "box prompt": BOX_COLOUR, "prediction": PREDICTION_COLOUR}
    picture = mosaic(rows, legend, f"{place.pipeline.settings.name}: largest tumour slice of each test case")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    path = place.out / "overview.png"
    write_bytes_atomically(path, buffer.getvalue())
    return path


def _case_row(place: Workplace, record: CaseRecord, fold: str, labels: Sequence[str]) -> list[Panel]:
    case = read_case(record, place.root, place.pipeline.base.data.modalities, allow_missing=True)
    if case.label_map is None:
        return []
    grid = oriented(case.geometry)
    reference = place_on(region_mask(case.label_map, "WT"), case.geometry, grid)
    k = int(reference.sum(axis=(0, 1)).argmax())
    shown = next(name for name in _PREFERRED if name in case.modalities)
    image = place_on(case.image[case.modalities.index(shown)], case.geometry, grid)[:, :, k]
    inside = np.argwhere(image != 0)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    window = np.s_[low[0] : high[0], low[1] : high[1]]
    panels = [Panel(image[window], {REFERENCE_COLOUR: reference[:, :, k][window]}, f"{record.case_id} {shown}")]
    for label in labels:
        methods = [m for m in place.pipeline.methods if m.label == label] or list(place.pipeline.methods[:1])
        folder = place.run_folder(methods[0], fold) / "predictions"
        boxes = read_box_table(folder / "prompts.csv").get(record.case_id, [])
        box = place_on(fill_boxes(boxes, case.geometry), case.geometry, grid)[:, :, k]
        outlines = {REFERENCE_COLOUR: reference[:, :, k][window], BOX_COLOUR: box[window]}
        if label != FLOOR:
            path = folder / f"{record.case_id}.nii.gz"
            if not path.is_file():
                continue
            outlines[PREDICTION_COLOUR] = place_on(read_label_map(path).array > 0, case.geometry, grid)[:, :, k][window]
        panels.append(Panel(image[window], outlines, f"{label}  Dice {_dice(place, label, record.case_id)}"))
    return panels


def _dice(place: Workplace, label: str, case_id: str) -> str:
    rows = read_table(place.out / "runs" / label / "per_case.csv", ("case_id", "region", "dice"))
    return next((f"{float(r['dice']):.3f}" for r in rows if r["case_id"] == case_id and r["region"] == "WT"), "")
