"""From a case on its native grid to the slices a model is fed: what there is to choose from.

The rules are plain numpy functions (no torch is imported here or in `stages`); `dictionary` wraps the same functions
as MONAI transforms for use in a `monai.transforms.Compose`. A new entry is one function and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from medsam_lora.transforms.cropping import CropCentre, about_box_centre, about_image_centre
from medsam_lora.transforms.intensity import CountedVoxels, all_voxels, nonzero_voxels
from medsam_lora.transforms.slicing import Slicing, every_candidate, every_step, largest_area, random_count

SLICINGS: Final[Mapping[str, Slicing]] = {
    "full": every_candidate,
    "every_second": every_step,
    "random": random_count,
    "max_slice": largest_area,
}
"""Which of the candidate slices are taken."""

CROP_CENTRES: Final[Mapping[str, CropCentre]] = {
    "image": about_image_centre,
    "box": about_box_centre,
}
"""Where the crop is centred, and the size that a fitted brain box asks for there."""

NORMALISATIONS: Final[Mapping[str, CountedVoxels]] = {
    "nonzero": nonzero_voxels,
    "all": all_voxels,
}
"""Which voxels the mean and the deviation are taken over, and keep a value other than 0 after the z-score."""
