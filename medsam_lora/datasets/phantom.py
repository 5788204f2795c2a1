"""A synthetic cohort that looks like BraTS: brains from formulae, tumours that grow in them, four MR contrasts.

A case is a function of a seed and its index, and nothing else; its anatomy and tumours live in millimetres of the
head, so that the same patient can be had on any grid. Some patients have two time points, with one anatomy, so
that a split by case instead of by patient shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import label

from medsam_lora.datasets.phantom_anatomy import HEAD_RADII_MM, Anatomy, Tissue, draw_anatomy, tissue_at
from medsam_lora.datasets.phantom_growth import KINDS, grow
from medsam_lora.datasets.phantom_image import render, scan
from medsam_lora.datasets.phantom_lattice import Lattice, brain_lattice
from medsam_lora.datasets.phantom_tumour import Lesion, before_push, labels_of, pathology_at
from medsam_lora.geometry import Geometry
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.nifti import write_image, write_label_map
from medsam_lora.labels import MODALITIES
from medsam_lora.processes import sharing_cores
from medsam_lora.progress import track

DEMO_SHAPE = (96, 112, 64)

RECIPE = 2
"""Raised whenever the same seed gives other voxels, so that a cohort on disk is made again."""

RECORD = "phantom.json"

_CASES_PER_ROUND = 6
_PATIENTS_PER_ROUND = 5
_TWICE = 1
"""In every round of six cases the second patient was scanned twice."""
_LARGEST_TO_GROW_ML = 100

_KEYS = (*MODALITIES, "seg")
_CASE_ID = re.compile(r"BraTS-PHT-\d{5,}-\d{3}")


@dataclass(frozen=True)
class PhantomCase:
    """A synthetic case.

    Parameters
    ----------
    case_id : str
        Such as ``BraTS-PHT-00003-001``: patient 3, second time point.
    images : ndarray of int16, shape (4, X, Y, Z)
        In the order of `labels.MODALITIES`; 0 outside the brain and nowhere in it.
    label_map : ndarray of uint8, shape (X, Y, Z)
        Canonical labels.
    geometry : Geometry
    """

    case_id: str
    images: np.ndarray
    label_map: np.ndarray
    geometry: Geometry


def case_identity(index: int) -> tuple[int, int]:
    """Patient number and time point of the case of that index.

    Examples
    --------
    >>> [case_identity(index) for index in range(7)]
    [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (5, 0)]
    """
    whole, place = divmod(index, _CASES_PER_ROUND)
    return whole * _PATIENTS_PER_ROUND + place - (place > _TWICE), int(place == _TWICE + 1)


def case_name(index: int) -> str:
    """Case id, in the style of BraTS 2023.

    Examples
    --------
    >>> case_name(2)
    'BraTS-PHT-00001-001'
    """
    patient, moment = case_identity(index)
    return f"BraTS-PHT-{patient:05d}-{moment:03d}"


def default_affine(shape: Sequence[int]) -> np.ndarray:
    """Affine of a grid of that shape that holds a head: BraTS's axes (L, P, S), square pixels, no finer than 1 mm.

    Examples
    --------
    >>> default_affine((240, 240, 155)).tolist()
    [[-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 239.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    x, y, z = (2 * radius / n for radius, n in zip(HEAD_RADII_MM, shape, strict=True))
    plane, height = max(1.0, x, y), max(1.0, z)
    affine = np.diag([-plane, -plane, height, 1.0])
    affine[1, 3] = plane * (shape[1] - 1)
    # -0.0 is written to files as such and compares unequal in text.
    return affine + 0.0


def make_case(
    seed: int,
    index: int,
    shape: tuple[int, int, int] = DEMO_SHAPE,
    affine: np.ndarray | None = None,
    *,
    lesions: bool = True,
) -> PhantomCase:
    """Make one case.

    Parameters
    ----------
    seed : int
        Of the cohort, at least 0.
    index : int
        Of the case in it, at least 0.
    shape : tuple of int, (X, Y, Z)
    affine : ndarray, shape (4, 4), optional
        Voxel-centre index to RAS+ mm; `default_affine` where absent. The head stands upright in the world in the
        middle of the grid; it is shrunk where the field of view is too small for it.
    lesions : bool
        False gives the same head without tumours, and an empty label map.

    Returns
    -------
    PhantomCase
    """
    geometry = Geometry(shape, default_affine(shape) if affine is None else affine)
    patient, moment = case_identity(index)
    anatomy = draw_anatomy(np.random.default_rng([seed, patient, 0]))
    lattice = brain_lattice(anatomy) if lesions else None
    tumours = [] if lattice is None else _tumours(lattice, seed, patient, moment)
    generator = np.random.default_rng([seed, patient, 2, moment])

    inside, points = _head_points(geometry, generator.normal(0, 0.5, 3))
    tissue, mask, points = _tissue_on_grid(anatomy, tumours, geometry, inside, points)
    source = before_push(tumours, points)
    pathology = None if lattice is None else pathology_at(tumours, lattice, source)
    label_map = np.zeros(shape, np.uint8)
    if pathology is not None:
        label_map[mask] = labels_of(pathology, tissue.csf)
    signals = render(tissue, pathology, source, generator)
    images = scan(signals, mask, points, geometry, generator)
    return PhantomCase(case_name(index), images, label_map, geometry)


def _tumours(lattice: Lattice, seed: int, patient: int, moment: int) -> list[Lesion]:
    generator = np.random.default_rng([seed, patient, 1])
    twice = patient % _PATIENTS_PER_ROUND == _TWICE
    # Every round has each kind once; turning the order lets the patient scanned twice be of any kind.
    kind = KINDS[(patient + patient // _PATIENTS_PER_ROUND + seed) % len(KINDS)]
    # A second scan shows the tumour larger, or smaller after treatment; the largest do not grow further.
    sign = -1 if kind.total_ml[1] > _LARGEST_TO_GROW_ML else generator.choice([-1, 1])
    later = float(np.exp(sign * generator.uniform(0.2, 0.5)))
    return grow(lattice, generator, kind, [1.0, later] if twice else [1.0])[moment]


def _head_points(geometry: Geometry, shift_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the voxels near the head, and their place in the head frame, (N,) and (3, N)."""
    shape = np.array(geometry.shape)
    radii = np.array(HEAD_RADII_MM)
    centre = geometry.world((shape - 1) / 2)
    # Half the extent of the head's ellipsoid along each array axis, against half the field of view.
    axes = geometry.affine[:3, :3] / np.array(geometry.spacing_mm)
    needed = np.sqrt(((radii[:, None] * axes) ** 2).sum(axis=0))
    shrink = min(1.0, float((shape * geometry.spacing_mm / (2 * needed)).min()))
    to_head = geometry.affine[:3, :3] / shrink
    origin = (geometry.affine[:3, 3] - centre) / shrink + shift_mm
    ranges = [np.arange(n, dtype=np.float32) for n in geometry.shape]
    points = np.empty((3, *geometry.shape), np.float32)
    for row in range(3):
        i, j, k = (ranges[axis] * np.float32(to_head[row, axis]) for axis in range(3))
        points[row] = i[:, None, None] + j[None, :, None] + (k + np.float32(origin[row]))[None, None, :]
    flat = points.reshape(3, -1)
    near = np.flatnonzero(((flat / radii.astype(np.float32)[:, None]) ** 2).sum(axis=0) < 1)
    return near, flat[:, near]


def _tissue_on_grid(
    anatomy: Anatomy, tumours: Sequence[Lesion], geometry: Geometry, near: np.ndarray, points: np.ndarray
) -> tuple[Tissue, np.ndarray, np.ndarray]:
    """Tissue of the voxels of the skull-stripped head, their mask on the grid, and their places in the head."""
    voxel_mm = float(np.cbrt(np.prod(geometry.spacing_mm)))
    tissue = tissue_at(anatomy, before_push(tumours, points), voxel_mm)
    mask = np.zeros(int(np.prod(geometry.shape)), bool)
    mask[near] = tissue.head > 0
    mask = mask.reshape(geometry.shape)
    parts, count = label(mask)
    if count > 1:
        mask = parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    keep = mask.ravel()[near]
    return tissue.at(keep), mask, points[:, keep]


def make_cohort(
    out: Path,
    n_cases: int = 12,
    seed: int = 0,
    shape: tuple[int, int, int] = DEMO_SHAPE,
    affine: np.ndarray | None = None,
    *,
    lesions: bool = True,
    workers: int = 1,
) -> list[str]:
    """Write a cohort as ``out/<case_id>/<case_id>-t1n.nii.gz`` and so on, with ``-seg.nii.gz``.

    Parameters
    ----------
    out : Path
        ``phantom.json`` there records the settings and the sha256 of each file. Files that are as recorded are left
        alone where they belong to this cohort, and removed where they belong to another: what is discovered in
        `out` is this cohort and no mixture. Files that are not in the record are never touched.
    n_cases, seed : int
    shape, affine, lesions
        As in `make_case`.
    workers : int
        Processes.

    Returns
    -------
    list of str
        Case ids, in order.
    """
    affine = default_affine(shape) if affine is None else np.asarray(affine, np.float64)
    settings = {"recipe": RECIPE, "seed": seed, "shape": list(shape), "affine": affine.tolist(), "lesions": lesions}
    names = [case_name(index) for index in range(n_cases)]
    known = _kept(out, settings, names)
    missing = [index for index in range(n_cases) if not _is_there(out / names[index], known.get(names[index], {}))]
    _write_record(out, settings, known)
    work = partial(_write_case, out, seed, shape, affine, lesions)
    for case_id, digests in track(_mapped(work, missing, workers), "phantom cohort", len(missing)):
        known[case_id] = digests
        # After every case, so that an interrupted run goes on where it was.
        _write_record(out, settings, known)
    return names


def _mapped(work: partial, items: Sequence[int], workers: int) -> Iterator[tuple[str, dict[str, str]]]:
    if workers <= 1 or len(items) <= 1:
        yield from map(work, items)
        return
    # Not forked: a parent that has run torch may hold locks that a fork would copy.
    workers = min(workers, len(items))
    with sharing_cores(workers), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(work, items)


def _write_case(
    out: Path, seed: int, shape: tuple[int, int, int], affine: np.ndarray, lesions: bool, index: int
) -> tuple[str, dict[str, str]]:
    case = make_case(seed, index, shape, affine, lesions=lesions)
    folder = out / case.case_id
    paths = [folder / _file_name(case.case_id, key) for key in _KEYS]
    for path, image in zip(paths[:-1], case.images, strict=True):
        write_image(path, nib.Nifti1Image(image, case.geometry.affine), case.geometry)
    write_label_map(paths[-1], case.label_map, case.geometry)
    return case.case_id, {path.name: sha256_of(path) for path in paths}


def _kept(out: Path, settings: dict, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Recorded digests of the cases of this cohort; what is recorded of any other is removed."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    if not isinstance(record, dict):
        return {}
    same = {key: record.get(key) for key in settings} == settings
    kept = {}
    for case_id, digests in record.get("cases", {}).items():
        if same and case_id in names:
            kept[case_id] = digests
            continue
        if not _CASE_ID.fullmatch(case_id):
            # The record is a file like any other: a name in it must not lead out of the cohort.
            continue
        folder = out / case_id
        for path in (folder / _file_name(case_id, key) for key in _KEYS):
            if path.is_file() and sha256_of(path) == digests.get(path.name):
                path.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return kept


def _write_record(out: Path, settings: dict, cases: dict[str, dict[str, str]]) -> None:
    data = json.dumps({**settings, "cases": dict(sorted(cases.items()))}, indent=1).encode()
    path = out / RECORD
    if not (path.is_file() and path.read_bytes() == data):
        write_bytes_atomically(path, data)


def _file_name(case_id: str, key: str) -> str:
    return f"{case_id}-{key}.nii.gz"


def _is_there(folder: Path, digests: dict[str, str]) -> bool:
    files = [(folder / name, digest) for name, digest in digests.items()]
    return bool(files) and all(path.is_file() and sha256_of(path) == digest for path, digest in files)
