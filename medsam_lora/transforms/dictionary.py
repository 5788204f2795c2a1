"""The stages as dictionary transforms of MONAI, for a `monai.transforms.Compose`.

Each takes and gives a dict of `MetaTensor`, shape (C, X, Y, Z), whose affine is right after every stage: a landmark
keeps its world position. What is generic is MONAI's own (orientation, crop, padding); every rule of ours is the
function that `stages.prepare_case` calls too. From `SelectSlicesd` on a case is a list of slices, each a volume of
depth 1, as with MONAI's own multi-sample crops.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import BorderPad, MapTransform, Orientationd, SpatialCrop, Transform

from medsam_lora.geometry import Geometry
from medsam_lora.transforms import SLICINGS
from medsam_lora.transforms.cropping import CropPlan, crop_window, refuse_tumour_loss
from medsam_lora.transforms.intensity import statistics, zscore
from medsam_lora.transforms.masking import region_areas, region_masks
from medsam_lora.transforms.resizing import masks_to_model_frame, model_scale, to_model_frame
from medsam_lora.transforms.slicing import SlicingPlan, select_slices
from medsam_lora.transforms.stages import STAGES, PreparePlan

Data = dict[Hashable, Any]

RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


def prepare_transforms(plan: PreparePlan) -> list[Transform]:
    """The stages of a training case in their order.

    Parameters
    ----------
    plan : PreparePlan
        With a fitted crop.

    Returns
    -------
    list of Transform
        From ``image`` (M, X, Y, Z) and ``label`` (1, X, Y, Z), canonical, with a ``case_id``, to a list of slices
        with ``image`` z-scored (M, X, Y, 1), ``label``, ``mask`` (1, X, Y, 1) and ``k``.
    """
    both = ("image", "label")
    by_name: dict[str, Transform] = {
        "orient": Orientationd(both, axcodes="RAS", labels=RAS_LABELS),
        "measure": MeasureIntensityd("image", plan.voxels, plan.scope),
        "slice": SelectSlicesd(both, plan.slicing, plan.region),
        "crop": CropPlaned(both, plan.crop),
        "zscore": ZScored("image", plan.voxels),
        "mask": RegionMaskd("label", [plan.region]),
    }
    return [by_name[name] for name in STAGES]


def geometry_of(tensor: MetaTensor) -> Geometry:
    """Placement of the last three axes of a MetaTensor."""
    x, y, z = tensor.shape[-3:]
    return Geometry((x, y, z), np.asarray(tensor.affine, np.float64))


def placed(array: torch.Tensor | np.ndarray, geometry: Geometry, like: MetaTensor) -> MetaTensor:
    """A MetaTensor with the meta data of another, standing elsewhere."""
    tensor = MetaTensor(torch.as_tensor(array), meta=dict(like.meta))
    tensor.affine = torch.as_tensor(geometry.affine.copy())
    return tensor


class MeasureIntensityd(MapTransform):
    """Add ``<key>_mean`` and ``<key>_std``, ndarrays of shape (Z, M), measured before any voxel is cut off."""

    def __init__(self, keys: str | Sequence[str], voxels: str = "nonzero", scope: str = "volume") -> None:
        super().__init__(keys)
        self.voxels, self.scope = voxels, scope

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = np.asarray(result[key])
            mean, std = statistics(image, self.voxels, self.scope, range(image.shape[-1]))
            result[f"{key}_mean"], result[f"{key}_std"] = mean, std
        return result


class SelectSlicesd(MapTransform):
    """Cut a case into a list of dicts, one per transverse slice chosen, each with its index ``k``.

    Reads ``image``, ``label`` and ``case_id``; statistics of `MeasureIntensityd` are cut along.
    """

    def __init__(self, keys: str | Sequence[str], plan: SlicingPlan, region: str = "WT") -> None:
        super().__init__(keys)
        self.plan, self.region = plan, region

    def __call__(self, data: Mapping[Hashable, Any]) -> list[Data]:
        """See the class."""
        label, image = np.asarray(data["label"])[0], np.asarray(data["image"])
        brain = (image != 0).any(axis=(0, 1, 2))
        choose = SLICINGS[self.plan.name]
        ks = select_slices(choose, region_areas(label, self.region), brain, self.plan, str(data["case_id"]))
        return [self._slice(data, int(k)) for k in ks]

    def _slice(self, data: Mapping[Hashable, Any], k: int) -> Data:
        result: Data = {**data, "k": k}
        for key in self.key_iterator(result):
            whole = result[key]
            result[key] = placed(whole.as_tensor()[..., k : k + 1], geometry_of(whole).at_slice(k), whole)
            for name in (f"{key}_mean", f"{key}_std"):
                if name in result:
                    result[name] = result[name][k]
        return result


class CropPlaned(MapTransform):
    """Crop the transverse plane and pad it with zeros where the crop is larger.

    Refuses to cut tumour off what it is given (``label``), unless the plan allows it.
    """

    def __init__(self, keys: str | Sequence[str], plan: CropPlan) -> None:
        super().__init__(keys)
        self.plan = plan

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        if "label" in result and not self.plan.allow_tumour_loss:
            tumour = np.asarray(result["label"])[0] != 0
            window = crop_window(self.plan, tumour.shape[:2])
            refuse_tumour_loss(tumour, *window, str(result.get("case_id")))
        for key in self.key_iterator(result):
            result[key] = _cropped(result[key], self.plan)
        return result


def _cropped(tensor: MetaTensor, plan: CropPlan) -> Any:
    x, y, z = tensor.shape[-3:]
    start, stop = crop_window(plan, (x, y))
    inside = SpatialCrop(roi_start=(*start, 0), roi_end=(*stop, z))(tensor)
    ends = [(max(-a, 0), max(b - n, 0)) for a, b, n in zip(start, stop, (x, y), strict=True)]
    # BorderPad's order: before and after of the first axis, then of the second, then of the third.
    return BorderPad([n for pair in ends for n in pair] + [0, 0])(inside)


class ZScored(MapTransform):
    """Normalise a slice (M, X, Y, 1) with the statistics of `MeasureIntensityd`."""

    def __init__(self, keys: str | Sequence[str], voxels: str = "nonzero") -> None:
        super().__init__(keys)
        self.voxels = voxels

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            raw = result[key]
            z = zscore(raw.as_tensor()[..., 0], result[f"{key}_mean"], result[f"{key}_std"], self.voxels)
            result[key] = placed(z[..., None], geometry_of(raw), raw)
        return result


class RegionMaskd(MapTransform):
    """Add ``mask``, bool (R, X, Y, Z), the regions of a canonical label map, which is kept."""

    def __init__(self, keys: str | Sequence[str], regions: Sequence[str] = ("WT",), mask_key: str = "mask") -> None:
        super().__init__(keys)
        self.regions, self.mask_key = tuple(regions), mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            label = result[key]
            masks = region_masks(np.asarray(label)[0], self.regions)
            result[self.mask_key] = placed(masks, geometry_of(label), label)
        return result


class ResizeLongSided(MapTransform):
    """Bring slices (C, X, Y, 1) to the model frame (C, S, S, 1); adds ``scale``, model pixels per voxel.

    Floating-point images are resized bilinearly, masks and labels by nearest neighbour. Images must hold normalised
    pixels (`models.input_spec`), in which the padding's 0 is SAM's mean colour.
    """

    def __init__(self, keys: str | Sequence[str], image_size: int = 1024) -> None:
        super().__init__(keys)
        self.image_size = image_size

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            tensor = result[key]
            x, y = tensor.shape[-3:-1]
            resize = to_model_frame if tensor.is_floating_point() else masks_to_model_frame
            resized = resize(tensor.as_tensor()[None, ..., 0], self.image_size)[0, ..., None]
            scale, (h, w) = model_scale((x, y), self.image_size)
            result[key] = placed(resized, _resized_geometry(geometry_of(tensor), (h, w), self.image_size), tensor)
            result["scale"] = scale
        return result


def _resized_geometry(geometry: Geometry, size: tuple[int, int], image_size: int) -> Geometry:
    x, y, z = geometry.shape
    step = np.array([x / size[0], y / size[1], 1.0])
    affine = geometry.affine.copy()
    affine[:3, :3] *= step
    # The edges of the first voxels coincide, so the centre of the first pixel lies half a pixel from that edge.
    affine[:3, 3] = geometry.world((step - 1) / 2)
    return Geometry((image_size, image_size, z), affine)
