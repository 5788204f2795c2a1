"""Where boxes come from: the reference of a case, or a table; and how they reach the grid they are used on.

Boxes of a case live in the *native* frame: (i, j, k) are array axes 0, 1, 2 of its files as nibabel reads them, on
voxel edges, half-open; each lies on one slice k along axis 2. Axis 2 of nearly every file is the transverse one. In
a file whose transverse axis is another, a transverse box crosses many slices k and is written as one thin row for
each of them; `on_grid` joins them again, by their union in each transverse slice, so exactly. Boxes per component
cannot be told apart after that union and are refused for such files.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Final

import numpy as np

from medsam_lora.errors import DataError, ManifestError
from medsam_lora.geometry import Geometry, axis_map, map_box
from medsam_lora.labels import region_mask
from medsam_lora.prompts.box import boxes_from_mask
from medsam_lora.records import SliceBox

COLUMNS: Final = ("case_id", *(field.name for field in fields(SliceBox)))
"""Header of a box table: case_id,k,i0,j0,i1,j1."""

_SHOWN_FAULTS = 5


def read_box_table(path: Path, geometries: Mapping[str, Geometry] | None = None) -> dict[str, list[SliceBox]]:
    """Read a box table, refusing it whole where a line of it cannot be meant.

    Parameters
    ----------
    path : Path
        CSV with the columns `COLUMNS`; further columns are ignored.
    geometries : mapping of str to Geometry, optional
        Native grid by case; the boxes of these cases must lie inside it.

    Returns
    -------
    dict of str to list of SliceBox
        By case, in the order of the lines.

    Raises
    ------
    ManifestError
        Naming line and case of every fault (the first few): values that are no finite numbers, an upper edge not
        above the lower one, negative edges, edges beyond the volume.
    """
    boxes: dict[str, list[SliceBox]] = {}
    faults = []
    for line, row in _rows(path):
        case_id = row["case_id"].strip()
        box, fault = _parsed(row)
        geometry = None if geometries is None else geometries.get(case_id)
        if box is not None and geometry is not None and not inside(box, geometry):
            fault = f"the box leaves the volume of shape {geometry.shape}"
        if not case_id:
            fault = "no case_id"
        if fault or box is None:
            faults.append(f"line {line}, case {case_id or '(none)'}: {fault}")
            continue
        boxes.setdefault(case_id, []).append(box)
    if faults:
        more = f" and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise ManifestError(
            "; ".join(faults[:_SHOWN_FAULTS]) + more,
            path=path,
            remedy="Give edges of native voxels, half-open, i, j, k being array axes 0, 1, 2 of the file.",
        )
    return boxes


def write_box_table(path: Path, boxes: Mapping[str, Sequence[SliceBox]]) -> None:
    """Write a box table, whole or not at all; `read_box_table` gives the same boxes back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case_id, own in boxes.items():
        for box in own:
            writer.writerow([case_id, int(box.k), *(repr(float(edge)) for edge in astuple(box)[1:])])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(path)


def inside(box: SliceBox, geometry: Geometry) -> bool:
    """Whether a box lies inside a volume, its last edges included.

    Examples
    --------
    >>> inside(SliceBox(5, 0, 0, 4, 4), Geometry((4, 4, 6), np.eye(4)))
    True
    """
    x, y, z = geometry.shape
    return 0 <= box.k < z and 0 <= box.i0 < box.i1 <= x and 0 <= box.j0 < box.j1 <= y


def reference_boxes(
    label_map: np.ndarray, geometry: Geometry, region: str, kind: str = "union", min_voxels: int = 1
) -> list[SliceBox]:
    """Boxes around a region of the reference, one set per transverse slice, in the native frame.

    Parameters
    ----------
    label_map : ndarray of uint8, shape geometry.shape
        Canonical labels on the native grid.
    geometry : Geometry
        Native grid.
    region : str
        A key of `labels.REGIONS`.
    kind, min_voxels
        As in `prompts.box.boxes_from_mask`.

    Returns
    -------
    list of SliceBox
        By ascending k. Where axis 2 is not the transverse axis, thin rows (see the module).

    Raises
    ------
    DataError
        Where boxes per component are asked of a file whose axis 2 is not the transverse one.
    """
    mask = region_mask(label_map, region)
    axis = _transverse_axis(geometry)
    shown = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))).tolist()
    if axis == 2:
        return [_slice_box(k, box) for k in shown for box in boxes_from_mask(mask[:, :, k], kind, min_voxels)]
    if kind != "union":
        raise DataError(
            f"boxes per component need files whose third axis is the transverse one; here it is axis {axis}",
            remedy="Reorient the files, for example to RAS, or set prompt.boxes=union.",
        )
    rows = []
    for s in shown:
        # Of the plane's two axes the second is always axis 2, along which the rows are counted.
        for low, first, high, last in boxes_from_mask(mask.take(s, axis=axis)):
            edges = (s, low, s + 1, high) if axis == 0 else (low, s, high, s + 1)
            rows += [_slice_box(k, edges) for k in range(int(first), int(last))]
    return sorted(rows, key=lambda box: box.k)


def whole_slices(shows: np.ndarray) -> list[SliceBox]:
    """A box around each whole slice that shows something, for methods that need no prompt.

    Parameters
    ----------
    shows : ndarray of bool, shape (X, Y, Z)
        On the native grid.

    Returns
    -------
    list of SliceBox
        By ascending k.

    Examples
    --------
    >>> shows = np.zeros((4, 3, 2), bool)
    >>> shows[2, 2, 1] = True
    >>> whole_slices(shows)
    [SliceBox(k=1, i0=0.0, j0=0.0, i1=4.0, j1=3.0)]
    """
    x, y, _ = shows.shape
    return [_slice_box(int(k), (0, 0, x, y)) for k in np.flatnonzero(shows.any(axis=(0, 1)))]


def on_grid(boxes: Sequence[SliceBox], source: Geometry, target: Geometry) -> dict[int, np.ndarray]:
    """Bring native boxes to the slices of another grid, exactly.

    Parameters
    ----------
    boxes : sequence of SliceBox
        On `source`.
    source, target : Geometry
        Grids of the same voxels: flips, permutations and crops of each other.

    Returns
    -------
    dict of int to ndarray of float32, shape (n, 4)
        By slice index along axis 2 of `target`: (i0, j0, i1, j1) on its voxel edges, clipped to it; boxes wholly
        outside are dropped. Where axis 2 of the two grids is not the same anatomical axis, one box per slice: the
        union of the boxes that touch it.

    Raises
    ------
    DataError
        Where the voxels of the two grids do not coincide.
    """
    exact = axis_map(source, target)
    if exact is None:
        raise DataError(
            "the boxes stand on a grid whose voxels are not those of the target grid",
            remedy="Give boxes in the voxels of the case's own files.",
        )
    x, y, z = target.shape
    placed: dict[int, list[list[float]]] = {}
    for box in boxes:
        i0, j0, k0, i1, j1, k1 = map_box((box.i0, box.j0, box.k, box.i1, box.j1, box.k + 1), source, target)
        clipped = [max(i0, 0.0), max(j0, 0.0), min(i1, x), min(j1, y)]
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            continue
        for k in range(max(math.floor(k0), 0), min(math.ceil(k1), z)):
            placed.setdefault(k, []).append(clipped)
    stacked = {k: np.array(own, np.float32) for k, own in sorted(placed.items())}
    if exact.axes[2] == 2:
        return stacked
    return {k: np.hstack([own[:, :2].min(0), own[:, 2:].max(0)])[None] for k, own in stacked.items()}


def fill_boxes(boxes: Sequence[SliceBox], geometry: Geometry) -> np.ndarray:
    """The filled boxes as a mask: the floor that any box-prompted model must beat.

    Parameters
    ----------
    boxes : sequence of SliceBox
        On the native grid.
    geometry : Geometry
        Native grid.

    Returns
    -------
    ndarray of bool, shape geometry.shape
        True for the voxels whose centre lies inside a box (from its lower edge, up to but without its upper one).

    Examples
    --------
    >>> fill_boxes([SliceBox(0, 0.5, 1, 2, 2)], Geometry((3, 2, 1), np.eye(4)))[:, :, 0].astype(int).tolist()
    [[0, 1], [0, 1], [0, 0]]
    """
    mask = np.zeros(geometry.shape, bool)
    for box in boxes:
        if 0 <= box.k < geometry.shape[2]:
            rows, columns = (_centres_within(*ends) for ends in ((box.i0, box.i1), (box.j0, box.j1)))
            mask[rows, columns, box.k] = True
    return mask


def _centres_within(low: float, high: float) -> slice:
    # Voxel i has its centre at i + 0.5 on the axis of edges.
    return slice(max(math.ceil(low - 0.5), 0), max(math.ceil(high - 0.5), 0))


def _transverse_axis(geometry: Geometry) -> int:
    return next(axis for axis, code in enumerate(geometry.axis_codes) if code in "IS")


def _slice_box(k: int, box: Iterable[float]) -> SliceBox:
    i0, j0, i1, j1 = (float(edge) for edge in box)
    return SliceBox(int(k), i0, j0, i1, j1)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each line."""
    if not path.is_file():
        raise ManifestError("no such file", path=path, remedy="Check the path.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, restval="")
            absent = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if absent:
                raise ManifestError(
                    f"the box table lacks the column {', '.join(absent)}",
                    path=path,
                    remedy=f"Its columns must be {','.join(COLUMNS)}.",
                )
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"not a CSV table ({error})", path=path, remedy="Save it as UTF-8 CSV.") from error


def _parsed(row: Mapping[str, str]) -> tuple[SliceBox | None, str]:
    """The box of a line, or None and what is wrong with it."""
    try:
        k = int(row["k"])
    except ValueError:
        return None, f"k is {row['k']!r}, not a whole number"
    edges = []
    for name in COLUMNS[2:]:
        try:
            edges.append(float(row[name]))
        except ValueError:
            return None, f"{name} is {row[name]!r}, not a number"
    box = _slice_box(k, edges)
    if not all(math.isfinite(edge) for edge in edges):
        return None, f"an edge is not finite ({', '.join(f'{edge:g}' for edge in edges)})"
    if k < 0 or min(edges) < 0:
        return None, "a negative index lies outside every volume"
    if box.i0 >= box.i1 or box.j0 >= box.j1:
        return None, f"the upper edges ({box.i1:g}, {box.j1:g}) are not above the lower ({box.i0:g}, {box.j0:g})"
    return box, ""
