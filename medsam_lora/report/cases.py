"""Where the images of scored cases are, and one case read as the report shows it: R, A, S, cropped to the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.io.case import read_case
from medsam_lora.io.manifest import read_manifest
from medsam_lora.io.nifti import read_label_map
from medsam_lora.io.predictions import PROMPTS_NAME, meanings_for, predicted_mask, prediction_path, read_record
from medsam_lora.labels import MODALITIES, REGIONS, region_mask, regions_of
from medsam_lora.prompts.sources import fill_boxes, read_box_table
from medsam_lora.records import CaseRecord
from medsam_lora.report.collect import TRAINING_RECORD, Run, read_json
from medsam_lora.transforms.orientation import orient

REGION_BITS: Mapping[str, int] = {region: 1 << i for i, region in enumerate(REGIONS)}
"""Bit of every region in the label maps of the page, where a voxel can be of several regions or of WT alone."""

_MARGIN = 2


@dataclass(frozen=True)
class Place:
    """Where a case is: its line of a manifest, and the data root."""

    record: CaseRecord
    root: Path
    manifest: Path


@dataclass(frozen=True)
class ShownCase:
    """A case as the report shows it.

    Parameters
    ----------
    case_id : str
    modalities : tuple of str
        Channel order of `image`.
    image : ndarray of int16 or float32, shape (M, X, Y, Z)
        Oriented to R, A, S and cropped.
    reference : ndarray of uint8, shape (X, Y, Z), or None
        Regions as `REGION_BITS`.
    predictions : mapping of str to ndarray
        By label of the run, as `reference`.
    geometry : Geometry
        Of the cropped grid.
    """

    case_id: str
    modalities: tuple[str, ...]
    image: np.ndarray
    reference: np.ndarray | None
    predictions: Mapping[str, np.ndarray]
    geometry: Geometry


def find_places(
    runs: Sequence[Run], default_root: Path, manifest: Path | None = None, root: Path | None = None
) -> dict[str, Place]:
    """Where the scored cases are, by case id; those that no manifest lists are not in it.

    Parameters
    ----------
    runs : sequence of Run
        Their prediction records name manifest and root; a pipeline folder has ``manifest.csv`` and ``run.json``.
    default_root : Path
        Where the records name no folder that exists.
    manifest, root : Path, optional
        Over what the records say; a manifest alone has its own folder as root.

    Raises
    ------
    ManifestError
        Where a manifest cannot be used.
    """
    if manifest is not None:
        pairs = [(manifest, manifest.parent if root is None else root)]
    else:
        # What was recorded goes before what can be guessed from where a folder lies.
        found = [pair for run in runs for pair in _recorded(run)]
        found += [pair for run in runs for pair in _beside(run, default_root)]
        pairs = [(path, base if root is None else root) for path, base in found]
    wanted = {row["case_id"] for run in runs for row in run.rows}
    places: dict[str, Place] = {}
    for path, base in dict.fromkeys(pairs):
        for record in read_manifest(path):
            if record.case_id in wanted:
                places.setdefault(record.case_id, Place(record, base, path))
    return places


def read_shown(place: Place, runs: Sequence[Run], floor: str) -> ShownCase:
    """Read a case and what the runs predicted for it.

    Parameters
    ----------
    place : Place
    runs : sequence of Run
        A run without a usable prediction of the case is left out.
    floor : str
        Method name of the floor, which predicts the boxes that the other runs were prompted with.

    Raises
    ------
    DataError, ManifestError
        Where the images cannot be read.
    """
    record = place.record
    case = read_case(record, place.root, MODALITIES, allow_missing=True)
    image, grid = orient(case.image, case.geometry)
    reference = None
    if case.label_map is not None:
        scored = regions_of(record.label_convention)
        reference = orient(_bits(case.label_map, scored), case.geometry)[0]
    predictions = {}
    for run in runs:
        of_floor = run.method == floor
        codes = _boxes(runs, record, case.geometry) if of_floor else _prediction(run, record, case.geometry)
        if codes is not None:
            predictions[run.label] = orient(codes, case.geometry)[0]
    # Air is cut off, and nothing that is shown on top of the images.
    head = (image != 0).any(axis=0)
    for codes in [*predictions.values(), *([] if reference is None else [reference])]:
        head = head | (codes != 0)
    window = _window(head)
    start, stop = [s.start for s in window], [s.stop for s in window]
    return ShownCase(
        record.case_id,
        case.modalities,
        image[(slice(None), *window)],
        None if reference is None else reference[window],
        {label: codes[window] for label, codes in predictions.items()},
        grid.cropped(start, stop),
    )


def largest_slice(mask: np.ndarray) -> tuple[int, int, int]:
    """A voxel to look at first: the plane along Z with most of the mask, and the mask's centre in that plane.

    Without a mask, the middle of the volume.

    Examples
    --------
    >>> mask = np.zeros((4, 4, 3), bool)
    >>> mask[1:4, 2, 1] = True
    >>> largest_slice(mask)
    (2, 2, 1)
    """
    if not mask.any():
        x, y, z = mask.shape
        return x // 2, y // 2, z // 2
    k = int(np.count_nonzero(mask, axis=(0, 1)).argmax())
    i, j = np.argwhere(mask[:, :, k]).mean(axis=0)
    return round(float(i)), round(float(j)), k


def _recorded(run: Run) -> list[tuple[Path, Path]]:
    pairs = []
    for record in run.prediction:
        named, root = record.data.get("manifest"), record.data.get("root")
        if named and root and Path(str(named)).is_file() and Path(str(root)).is_dir():
            pairs.append((Path(str(named)), Path(str(root))))
    return pairs


def _beside(run: Run, default_root: Path) -> list[tuple[Path, Path]]:
    """The manifest of a pipeline whose folder was moved, or made before records named it."""
    place = run.folder.resolve()
    home = place.parent.parent
    if place.parent.name != "runs" or not (home / "manifest.csv").is_file():
        return []
    return [(home / "manifest.csv", _pipeline_root(home, default_root))]


def _pipeline_root(home: Path, default_root: Path) -> Path:
    record = home / TRAINING_RECORD
    settings = read_json(record).get("pipeline", {}) if record.is_file() else {}
    named = settings.get("root")
    if named and Path(str(named)).is_dir():
        return Path(str(named))
    return home / "cohort" if (home / "cohort").is_dir() else default_root


def _prediction(run: Run, record: CaseRecord, grid: Geometry) -> np.ndarray | None:
    if any(row["status"] != "ok" for row in run.rows if row["case_id"] == record.case_id):
        return None
    for folder in run.predictions:
        path = prediction_path(folder, record.case_id)
        about = read_record(folder)
        # Folds that were dealt anew can leave a file of a case that this fold no longer predicts.
        if path is None or (about.cases is not None and record.case_id not in about.cases):
            continue
        try:
            volume = read_label_map(path)
        except DataError:
            return None  # its row says so: scoring met the same file
        if not volume.geometry.matches(grid):
            return None
        meanings = meanings_for(about, record.label_convention)
        regions = [r for r in run.regions if r in REGION_BITS]
        masks = {r: predicted_mask(volume.array, r, meanings) for r in regions}
        codes = np.zeros(grid.shape, np.uint8)
        for region, mask in masks.items():
            codes[mask] |= REGION_BITS[region]
        return codes
    return None


def _boxes(runs: Sequence[Run], record: CaseRecord, grid: Geometry) -> np.ndarray | None:
    for table in [folder / PROMPTS_NAME for run in runs for folder in run.predictions]:
        boxes = read_box_table(table).get(record.case_id) if table.is_file() else None
        if boxes:
            # The floor is scored as if a box were each region, and is shown so.
            return fill_boxes(boxes, grid).astype(np.uint8) * np.uint8(sum(REGION_BITS.values()))
    return None


def _bits(label_map: np.ndarray, regions: Sequence[str]) -> np.ndarray:
    codes = np.zeros(label_map.shape, np.uint8)
    for region in regions:
        codes[region_mask(label_map, region)] |= REGION_BITS[region]
    return codes


def _window(head: np.ndarray) -> tuple[slice, slice, slice]:
    slices = []
    for axis in range(3):
        inside = np.flatnonzero(head.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, head.shape[axis])
        slices.append(slice(max(low - _MARGIN, 0), min(high + _MARGIN, head.shape[axis])))
    return slices[0], slices[1], slices[2]
