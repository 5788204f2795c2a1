"""The order of the stages, the plan that fixes every one of them, and a case taken through them.

The stages (`STAGES`) are: turn to R, A, S; measure mean and deviation over the whole volume; choose transverse
slices; crop the plane; z-score; threshold the labels to regions. The first four make what is stored, the last two
are applied at load, where box prompts and the resize to the model frame follow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import nibabel as nib
import numpy as np

from medsam_lora.errors import DataError
from medsam_lora.geometry import Geometry
from medsam_lora.labels import MODALITIES
from medsam_lora.records import CaseRecord, CaseVolumes, PreparedSlices
from medsam_lora.transforms import SLICINGS
from medsam_lora.transforms.cropping import (
    BrainBox,
    CropPlan,
    brain_box,
    crop_plane,
    crop_window,
    cropped_geometry,
    refuse_tumour_loss,
    voxels_lost,
)
from medsam_lora.transforms.intensity import statistics
from medsam_lora.transforms.masking import region_areas
from medsam_lora.transforms.orientation import memory_axes, orient, oriented
from medsam_lora.transforms.slicing import SlicingPlan, select_slices

STAGES: Final = ("orient", "measure", "slice", "crop", "zscore", "mask")
"""Names of the stages, in their order; `dictionary.prepare_transforms` holds a MONAI transform for each."""

FORMAT_VERSION: Final = 1
"""Of the store; part of every fingerprint, to be raised where the same plan gives other arrays than before."""

EVALUATION_SLICING: Final = SlicingPlan("full", tumour_only=True)
"""Cases that are not trained on keep every slice that shows the region, so that a Dice over them is volumetric."""


@dataclass(frozen=True)
class PreparePlan:
    """Everything that decides what is stored of a case.

    Parameters
    ----------
    modalities : tuple of str
        Channel order.
    region : str
        A key of `labels.REGIONS`: the region that slices are chosen by.
    slicing : SlicingPlan
        Of training cases.
    crop : CropPlan
    voxels : str
        A key of `transforms.NORMALISATIONS`.
    scope : str
        ``volume`` or ``slice``.
    nonfinite : {"reject", "zero"}
        What reading does with voxels that are not finite: ``reject`` or ``zero``.
    training_cases : str
        Digest of which cases are sliced by `slicing` (the others by `evaluation_slicing`), empty where both are
        the same: stores of different splits must not mix.
    """

    modalities: tuple[str, ...] = MODALITIES
    region: str = "WT"
    slicing: SlicingPlan = field(default_factory=SlicingPlan)
    crop: CropPlan = field(default_factory=CropPlan)
    voxels: str = "nonzero"
    scope: str = "volume"
    nonfinite: Literal["reject", "zero"] = "reject"
    training_cases: str = ""

    @property
    def slices_training_apart(self) -> bool:
        """Whether training cases are sliced otherwise than the others."""
        own, other = self.slicing, EVALUATION_SLICING
        return (own.name, own.tumour_only, own.empty_share) != (other.name, other.tumour_only, other.empty_share)

    def to_json(self) -> dict[str, Any]:
        """Plain data, from which `from_json` rebuilds an equal plan."""
        # Through JSON, so that tuples are lists here already as they are after reading.
        return json.loads(json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreparePlan:
        """The plan that `to_json` described."""
        fields = {key: value for key, value in data.items() if key != "format"}
        crop = dict(fields.pop("crop"))
        box = crop.pop("box")
        size = crop.pop("size")
        if box is not None:
            pairs = {key: tuple(box[key]) for key in ("low", "high", "plane")}
            box = BrainBox(**{**box, **pairs})
        return cls(
            modalities=tuple(fields.pop("modalities")),
            slicing=SlicingPlan(**fields.pop("slicing")),
            crop=CropPlan(**crop, size=None if size is None else tuple(size), box=box),
            **fields,
        )

    def fingerprint(self) -> str:
        """Twelve hex digits of the sha256 of the plan, the fitted crop and the format version included."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def prepare_case(case: CaseVolumes, plan: PreparePlan, slices: Sequence[int] | None = None) -> PreparedSlices:
    """Take a case from its native grid to cropped transverse slices with raw voxels.

    Parameters
    ----------
    case : CaseVolumes
    plan : PreparePlan
        With a fitted crop.
    slices : sequence of int, optional
        Indices along Z of the oriented grid to take instead of the plan's slicing, as prediction does. A crop that
        cuts tumour off is then reported but not refused: whether a case can be predicted must not depend on its
        reference.

    Returns
    -------
    PreparedSlices

    Raises
    ------
    DataError
        Where the crop would cut off tumour voxels and the plan does not allow it, or no slice can be chosen.
    """
    case_id = case.record.case_id
    image, grid = orient(case.image, case.geometry)
    label = None if case.label_map is None else orient(case.label_map, case.geometry)[0]
    brain = None if case.planes is not None else brain_of(image)
    start, stop = crop_window(plan.crop, grid.shape[:2])
    tumour = None if label is None else nonzero(label)
    if slices is None:
        if tumour is not None and not plan.crop.allow_tumour_loss:
            refuse_tumour_loss(tumour, start, stop, case_id)
        # Planes that were read are those that were chosen.
        ks = _chosen_slices(label, brain, plan, case.record) if case.planes is None else _oriented_planes(case)
    else:
        ks = _given_slices(slices, grid, case_id)
    at = ks if case.planes is None else [_oriented_planes(case).index(k) for k in ks]
    mean, std = statistics(image, plan.voxels, plan.scope, at)
    record = case.record
    return PreparedSlices(
        case_id,
        record.patient_id,
        record.split,
        tuple(case.modalities),
        _slice_major(image, at, start, stop),
        None if label is None else _slice_major(label, ks, start, stop),
        tuple(ks),
        mean,
        std,
        plan.voxels,
        case.geometry,
        cropped_geometry(grid, start, stop),
        _losses(brain, tumour, start, stop),
    )


def planes_needed(label_map: np.ndarray, geometry: Geometry, plan: PreparePlan, record: CaseRecord) -> list[int] | None:
    """The planes along native array axis 2 that a case's slices lie in, where the reference alone says which.

    Parameters
    ----------
    label_map : ndarray of uint8, shape (X, Y, Z)
        Canonical labels.
    geometry : Geometry
        Native grid.
    plan : PreparePlan
    record : CaseRecord

    Returns
    -------
    list of int or None
        None where the whole image must be seen: for statistics over the volume, for slices chosen by where the brain
        is, and where array axis 2 is not the transverse one.

    Raises
    ------
    DataError
        Where no slice can be chosen.
    """
    axis, sign = nib.orientations.io_orientation(geometry.affine)[2].astype(int)
    if plan.scope != "slice" or axis != 2:
        return None
    if record.split == "train":
        if plan.slicing.tumour_only and plan.slicing.empty_share:
            return None
    elif not label_map.any():
        return None
    label, grid = orient(label_map, geometry)
    ks = _chosen_slices(label, None, plan, record)
    return sorted(k if sign > 0 else grid.shape[2] - 1 - k for k in ks)


def _oriented_planes(case: CaseVolumes) -> list[int]:
    """The oriented slices that the last axis of the oriented image holds, of a case of which some planes were read."""
    assert case.planes is not None
    sign = nib.orientations.io_orientation(case.geometry.affine)[2, 1]
    last = case.geometry.shape[2] - 1
    return list(case.planes) if sign > 0 else [last - plane for plane in reversed(case.planes)]


def crop_geometry(native: Geometry, plan: PreparePlan) -> Geometry:
    """The oriented and cropped grid of a case, known from its geometry alone."""
    grid = oriented(native)
    return cropped_geometry(grid, *crop_window(plan.crop, grid.shape[:2]))


def case_brain_box(case: CaseVolumes) -> BrainBox:
    """The brain box of a case (the union of its non-zero voxels over modalities) in the oriented plane."""
    image, _ = orient(case.image, case.geometry)
    try:
        return brain_box(brain_of(image))
    except DataError as error:
        raise DataError(error.message, case_id=case.record.case_id, remedy=error.remedy, code=error.code) from error


def brain_of(image: np.ndarray) -> np.ndarray:
    """Voxels that are not 0 in some modality, shape (M, X, Y, Z) to (X, Y, Z)."""
    return nonzero(*image)


def nonzero(*volumes: np.ndarray) -> np.ndarray:
    """Voxels that are not 0 in some of the volumes, which lie alike in memory."""
    axes, flips = memory_axes(volumes[0])
    turned = [volume.transpose(axes)[flips] for volume in volumes]
    found = np.zeros(turned[0].shape, bool)
    # Plane by plane, in the order of the memory, so that what is between stays in the cache.
    for k, plane in enumerate(found):
        for volume in turned:
            plane |= volume[k] != 0
    return found[flips].transpose(np.argsort(axes))


def _chosen_slices(
    label: np.ndarray | None, brain: np.ndarray | None, plan: PreparePlan, record: CaseRecord
) -> list[int]:
    """Oriented slices; `brain` may be None where `planes_needed` says that it does not matter."""
    areas = None if label is None else region_areas(label, plan.region)
    planes = () if brain is None else np.moveaxis(brain, -1, 0)
    shown = np.array([plane.any() for plane in planes], bool)
    slicing = plan.slicing
    if record.split != "train":
        slicing = EVALUATION_SLICING
        if areas is None or not areas.any():
            # Nothing to choose by (a case to be predicted only): every slice that shows brain.
            return np.flatnonzero(shown).tolist()
    return select_slices(SLICINGS[slicing.name], areas, shown, slicing, record.case_id).tolist()


def _given_slices(slices: Sequence[int], grid: Geometry, case_id: str) -> list[int]:
    ks = sorted({int(k) for k in slices})
    if ks and not 0 <= ks[0] <= ks[-1] < grid.shape[2]:
        raise DataError(
            f"slices {ks[0]} to {ks[-1]} are not all among the {grid.shape[2]} of the volume",
            case_id=case_id,
            remedy="Check that the boxes belong to this file.",
        )
    return ks


def _slice_major(array: np.ndarray, ks: Sequence[int], start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
    """The slices of (..., X, Y, Z) at `ks`, cropped, as a contiguous (N, ..., X', Y')."""
    size = [b - a for a, b in zip(start, stop, strict=True)]
    taken = np.empty((len(ks), *array.shape[:-3], *size), array.dtype)
    # Slice by slice: each is turned within the cache.
    for n, k in enumerate(ks):
        taken[n] = crop_plane(array[..., k : k + 1], start, stop)[..., 0]
    return taken


def _losses(
    brain: np.ndarray | None, tumour: np.ndarray | None, start: Sequence[int], stop: Sequence[int]
) -> dict[str, int | None]:
    return {
        "brain_voxels": None if brain is None else int(np.count_nonzero(brain)),
        "brain_voxels_lost": None if brain is None else voxels_lost(brain, start, stop),
        "tumour_voxels": None if tumour is None else int(np.count_nonzero(tumour)),
        "tumour_voxels_lost": None if tumour is None else voxels_lost(tumour, start, stop),
    }
