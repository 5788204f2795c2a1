"""Voxels for the page's viewer: 8 bits, compressed, as text, and within a budget of bytes."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from medsam_lora.geometry import Geometry
from medsam_lora.report.cases import REGION_BITS, ShownCase, largest_slice

SHRINKINGS: Final = ((1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
"""What is tried in turn, in the plane and across it, as multiples of the smallest voxel spacing of a case."""

_PERCENTILES = (1.0, 99.5)


@dataclass(frozen=True)
class PackedCase:
    """A case in the form that the page holds.

    Parameters
    ----------
    about : dict
        For the viewer: id, shape and affine of the grid that is shown, modalities, runs, where to look first.
    blobs : dict of str to str
        Element id to the base64 of gzipped uint8 voxels, X slowest.
    """

    about: dict[str, Any]
    blobs: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes in the page."""
        return sum(len(text) for text in self.blobs.values())


@dataclass
class Packer:
    """Packs cases one by one; keeps, of all shrinkings that fit the budget, the finest.

    Every shrinking is packed until its cases are too large together, so that no case is read twice and no more than
    a budget's worth of each is held.

    Parameters
    ----------
    max_bytes : int
        For all cases together.
    """

    max_bytes: int
    packed: dict[tuple[int, int], list[PackedCase]] = field(default_factory=lambda: {s: [] for s in SHRINKINGS})
    n_cases: int = 0

    def add(self, case: ShownCase) -> None:
        """Pack a case in every shrinking that still fits."""
        done: dict[tuple[int, int, int], PackedCase] = {}
        for shrinking in list(self.packed):
            steps = steps_for(case.geometry, shrinking)
            if steps not in done:
                done[steps] = pack(case, self.n_cases, steps)
            self.packed[shrinking].append(done[steps])
            if sum(other.size for other in self.packed[shrinking]) > self.max_bytes:
                del self.packed[shrinking]
        self.n_cases += 1

    def finest(self) -> list[PackedCase] | None:
        """The cases in the finest shrinking that fits, None where none does."""
        return next(iter(self.packed.values()), None)


def steps_for(geometry: Geometry, shrinking: tuple[int, int]) -> tuple[int, int, int]:
    """How many voxels become one along X, Y and Z.

    Voxels that are long already along an axis are left so: the aim is a spacing, the same multiple for every axis of
    the case's smallest.

    Examples
    --------
    >>> steps_for(Geometry((8, 8, 8), np.diag([1.0, 1.0, 5.0, 1.0])), (3, 3))
    (3, 3, 1)
    """
    spacing = geometry.spacing_mm
    wanted = [min(spacing) * factor for factor in (shrinking[0], shrinking[0], shrinking[1])]
    x, y, z = (max(1, int(w / s + 1e-6)) for w, s in zip(wanted, spacing, strict=True))
    return x, y, z


def pack(case: ShownCase, number: int, steps: tuple[int, int, int]) -> PackedCase:
    """Window, shrink and compress a case.

    Parameters
    ----------
    case : ShownCase
    number : int
        Makes the ids of its elements.
    steps : tuple of int
        Voxels that become one, along X, Y, Z: images by their mean, label maps by the middle voxel.
    """
    blobs: dict[str, str] = {}
    modalities = {}
    for name, channel in zip(case.modalities, case.image, strict=True):
        modalities[name] = key = f"v{number}-{name}"
        blobs[key] = _compressed(shrink_image(windowed(channel), steps))
    about: dict[str, Any] = {"id": case.case_id, "modalities": modalities, "reference": None, "predictions": {}}
    if case.reference is not None:
        about["reference"] = f"v{number}-reference"
        blobs[about["reference"]] = _compressed(shrink_labels(case.reference, steps))
    for i, (label, codes) in enumerate(case.predictions.items()):
        about["predictions"][label] = key = f"v{number}-p{i}"
        blobs[key] = _compressed(shrink_labels(codes, steps))
    shape = tuple(-(-n // step) for n, step in zip(case.geometry.shape, steps, strict=True))
    focus = largest_slice(_tumour(case))
    affine = case.geometry.affine @ np.diag([*steps, 1.0])
    # The centre of the first block, not of its first voxel.
    affine[:3, 3] = case.geometry.world([(step - 1) / 2 for step in steps])
    about |= {
        "shape": list(shape),
        "spacing": [s * step for s, step in zip(case.geometry.spacing_mm, steps, strict=True)],
        "measured": list(case.geometry.spacing_mm),
        "affine": affine[:3].tolist(),
        "steps": list(steps),
        "focus": [f // step for f, step in zip(focus, steps, strict=True)],
    }
    return PackedCase(about, blobs)


def windowed(channel: np.ndarray) -> np.ndarray:
    """Grey values for display: 0 is background, 1 to 255 the voxels from the 1st to the 99.5th percentile.

    Parameters
    ----------
    channel : ndarray, shape (X, Y, Z)

    Returns
    -------
    ndarray of uint8, same shape

    Examples
    --------
    >>> windowed(np.array([[[0, 10, 20]]])).tolist()
    [[[0, 1, 255]]]
    """
    inside = channel != 0
    if not inside.any():
        return np.zeros(channel.shape, np.uint8)
    low, high = np.percentile(channel[inside], _PERCENTILES)
    scaled = np.clip((channel.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    return np.where(inside, 1 + np.rint(scaled * 254), 0).astype(np.uint8)


def shrink_image(image: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Mean over blocks; the last block of an axis may be cut short.

    Examples
    --------
    >>> shrink_image(np.array([[[0, 2, 4, 6, 9]]], np.uint8), (1, 1, 2)).tolist()
    [[[1, 5, 9]]]
    """
    if tuple(steps) == (1, 1, 1):
        return image
    shape = [-(-n // step) for n, step in zip(image.shape, steps, strict=True)]
    total, members = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for offset in np.ndindex(*steps):
        part = image[tuple(slice(o, None, step) for o, step in zip(offset, steps, strict=True))]
        window = tuple(slice(0, n) for n in part.shape)
        total[window] += part
        members[window] += 1
    return np.rint(total / members).astype(np.uint8)


def shrink_labels(codes: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """The voxel in the middle of every block (the last one where a block is cut short).

    Examples
    --------
    >>> shrink_labels(np.array([[[1, 2, 3, 4, 5, 6, 7]]], np.uint8), (1, 1, 3)).tolist()
    [[[2, 5, 7]]]
    """
    picked = [
        np.minimum(np.arange(-(-n // step)) * step + step // 2, n - 1)
        for n, step in zip(codes.shape, steps, strict=True)
    ]
    return np.ascontiguousarray(codes[np.ix_(*picked)])


def _tumour(case: ShownCase) -> np.ndarray:
    maps = [case.reference, *case.predictions.values()]
    shown = next((m for m in maps if m is not None and (m & REGION_BITS["WT"]).any()), None)
    return np.zeros(case.geometry.shape, bool) if shown is None else (shown & REGION_BITS["WT"]) > 0


def _compressed(array: np.ndarray) -> str:
    # No time stamp: the same voxels give the same page.
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), 6, mtime=0)).decode("ascii")
