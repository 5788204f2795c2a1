"""The crop of the transverse plane: fitted to the brains of the training split, or of a fixed size.

Positions along an axis are counted from the image centre, on voxel edges, so that images of different sizes can be
fitted together: an axis of n voxels reaches from -n/2 to n/2. Z is never cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry

Pair = tuple[float, float]

CropCentre = Callable[[float, float], Pair]
"""(low, high) of a brain box along one axis to (offset of the crop's centre, size that covers the box)."""


def about_image_centre(low: float, high: float) -> Pair:
    """Centred on the image: the size covers the farthest brain voxel on either side.

    Examples
    --------
    >>> about_image_centre(-60.0, 75.0)
    (0.0, 150.0)
    """
    return 0.0, 2 * max(abs(low), abs(high))


def about_box_centre(low: float, high: float) -> Pair:
    """Centred on the brain box, of its very size.

    Examples
    --------
    >>> about_box_centre(-60.0, 75.0)
    (7.5, 135.0)
    """
    return (low + high) / 2, high - low


@dataclass(frozen=True)
class BrainBox:
    """The box around the brains of some cases, in the oriented X, Y plane.

    Parameters
    ----------
    low, high : tuple of float, (X, Y)
        Voxel edges counted from the image centre.
    plane : tuple of int, (X, Y)
        The largest image of these cases.
    fitted_over : str
        ``train``, or ``all`` where there was no training case.
    n_cases : int
    """

    low: Pair
    high: Pair
    plane: tuple[int, int]
    fitted_over: str = "train"
    n_cases: int = 1


@dataclass(frozen=True)
class CropPlan:
    """Which part of the transverse plane is kept.

    Parameters
    ----------
    name : str
        ``brain_box``, or ``none`` for the whole plane.
    centre : str
        A key of `transforms.CROP_CENTRES`.
    size : tuple of int, (X, Y), or None
        Fixed size in voxels; None covers `box`.
    margin : int
        Voxels added on every side of a fitted box, as far as there is image.
    allow_tumour_loss : bool
        Go on where tumour voxels are cut off.
    box : BrainBox or None
        None until it is fitted; not needed for a fixed size about the image centre.
    """

    name: str = "brain_box"
    centre: str = "image"
    size: tuple[int, int] | None = None
    margin: int = 0
    allow_tumour_loss: bool = False
    box: BrainBox | None = None

    @property
    def needs_fit(self) -> bool:
        """Whether a brain box must be fitted before the crop is known."""
        return self.name != "none" and self.box is None and (self.size is None or self.centre == "box")


def brain_box(brain: np.ndarray) -> BrainBox:
    """The box of one case.

    Parameters
    ----------
    brain : ndarray of bool, shape (X, Y, Z) or (X, Y)
        Voxels that are not 0 in some modality, on the oriented grid.

    Raises
    ------
    DataError
        Where there is none.

    Examples
    --------
    >>> brain = np.zeros((10, 8), bool)
    >>> brain[2:6, 5] = True
    >>> box = brain_box(brain)
    >>> box.low, box.high
    ((-3.0, 1.0), (1.0, 2.0))
    """
    seen = np.asarray(brain.any(axis=2) if brain.ndim == 3 else brain)
    edges = []
    for axis, n in enumerate(seen.shape):
        along = np.flatnonzero(seen.any(axis=1 - axis))
        if not along.size:
            raise DataError(
                "every modality is 0 everywhere, so there is no brain",
                remedy="Check the files, or leave the case out of the manifest.",
                code="all_zero",
            )
        edges.append((float(along[0] - n / 2), float(along[-1] + 1 - n / 2)))
    (x0, x1), (y0, y1) = edges
    return BrainBox((x0, y0), (x1, y1), (seen.shape[0], seen.shape[1]))


def union_box(boxes: Sequence[BrainBox], fitted_over: str) -> BrainBox:
    """The smallest box around the boxes of several cases."""
    low, high, plane = (np.array([getattr(box, name) for box in boxes]) for name in ("low", "high", "plane"))
    (x0, y0), (x1, y1), (x, y) = low.min(axis=0).tolist(), high.max(axis=0).tolist(), plane.max(axis=0).tolist()
    return BrainBox((x0, y0), (x1, y1), (x, y), fitted_over, sum(box.n_cases for box in boxes))


def crop_window(plan: CropPlan, plane: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First voxel and the one past the last, along X and Y, of the crop of an image.

    Parameters
    ----------
    plan : CropPlan
        Fitted, where its size or centre needs it.
    plane : tuple of int, (X, Y)

    Returns
    -------
    start, stop : tuple of int, (X, Y)
        Outside ``0..n`` where the crop is larger than the image: that part is zeros.

    Examples
    --------
    >>> crop_window(CropPlan(size=(138, 202)), (240, 240))
    ((51, 19), (189, 221))
    >>> crop_window(CropPlan(size=(12, 4)), (10, 5))
    ((-1, 0), (11, 4))
    """
    if plan.name == "none":
        return (0, 0), plane
    if plan.needs_fit:
        raise ValueError("the crop is not fitted yet: CropPlan.box is None")
    from medsam_lora.transforms import CROP_CENTRES

    spans = []
    for axis, n in enumerate(plane):
        offset, fitted = 0.0, 0.0
        if plan.box is not None:
            # A margin adds no padding: it ends where the largest image of the fit ends.
            edge = plan.box.plane[axis] / 2
            low = max(plan.box.low[axis] - plan.margin, -edge)
            high = min(plan.box.high[axis] + plan.margin, edge)
            offset, fitted = CROP_CENTRES[plan.centre](low, high)
        size = math.ceil(fitted) if plan.size is None else plan.size[axis]
        start = math.floor((n - size) / 2 + offset)
        spans.append((start, start + size))
    (x0, x1), (y0, y1) = spans
    return (x0, y0), (x1, y1)


def crop_size(plan: CropPlan) -> tuple[int, int] | None:
    """Size (X, Y) of the crop where it is the same for every image, None where it is the whole plane of each.

    Examples
    --------
    >>> crop_size(CropPlan(size=(138, 202))), crop_size(CropPlan("none"))
    ((138, 202), None)
    """
    if plan.name == "none":
        return None
    (x0, y0), (x1, y1) = crop_window(plan, (0, 0))
    return x1 - x0, y1 - y0


def crop_plane(array: np.ndarray, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
    """The window of an array of shape (..., X, Y, Z); what lies outside the image is 0.

    Returns
    -------
    ndarray, shape (..., stop[0] - start[0], stop[1] - start[1], Z)
        A view where the window lies inside, else a copy. Its geometry is
        ``geometry.cropped((*start, 0), (*stop, Z))``.

    Examples
    --------
    >>> crop_plane(np.array([[[1], [2]], [[3], [4]]]), (1, -1), (2, 2))[..., 0].tolist()
    [[0, 3, 4]]
    """
    low = [max(a, 0) for a in start]
    high = [max(min(b, n), a) for b, n, a in zip(stop, array.shape[-3:-1], low, strict=True)]
    kept = array[..., low[0] : high[0], low[1] : high[1], :]
    if low == list(start) and high == list(stop):
        return kept
    padded = np.zeros((*array.shape[:-3], stop[0] - start[0], stop[1] - start[1], array.shape[-1]), array.dtype)
    # Where the overlap begins in the window; its extent is that of what was kept, which may be nothing.
    i, j = low[0] - start[0], low[1] - start[1]
    padded[..., i : i + kept.shape[-3], j : j + kept.shape[-2], :] = kept
    return padded


def voxels_lost(mask: np.ndarray, start: Sequence[int], stop: Sequence[int]) -> int:
    """How many voxels of a mask of shape (X, Y, Z) lie outside the window."""
    return int(np.count_nonzero(mask)) - int(np.count_nonzero(crop_plane(mask, start, stop)))


def refuse_tumour_loss(tumour: np.ndarray, start: Sequence[int], stop: Sequence[int], case_id: str) -> None:
    """Raise where the window cuts tumour voxels off.

    Parameters
    ----------
    tumour : ndarray of bool, shape (X, Y, Z)
    start, stop : sequence of int, (X, Y)
    case_id : str

    Raises
    ------
    DataError
        With how many voxels, and the size about the image centre that would keep them all.
    """
    lost = voxels_lost(tumour, start, stop)
    if not lost:
        return
    box = brain_box(tumour)
    needed = [math.ceil(about_image_centre(low, high)[1]) for low, high in zip(box.low, box.high, strict=True)]
    size = [b - a for a, b in zip(start, stop, strict=True)]
    raise DataError(
        f"the crop of {size[0]} x {size[1]} voxels cuts off {lost} of {np.count_nonzero(tumour)} tumour voxels",
        case_id=case_id,
        remedy=f"Set crop.size to at least {[max(a, b) for a, b in zip(size, needed, strict=True)]} "
        "(crop.centre=image), or crop.allow_tumour_loss=true.",
        code="tumour_cropped",
    )


def cropped_geometry(geometry: Geometry, start: Sequence[int], stop: Sequence[int]) -> Geometry:
    """The grid of `crop_plane`."""
    return geometry.cropped((start[0], start[1], 0), (stop[0], stop[1], geometry.shape[2]))
