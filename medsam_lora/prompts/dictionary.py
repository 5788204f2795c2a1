"""Box prompts as dictionary transforms of MONAI, to follow those of `transforms.dictionary` in a Compose.

Boxes stand on the grid of their slice until `BoxesToModeld` brings them, once and last, to the model frame.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform

from medsam_lora.prompts.box import boxes_from_mask, jitter, to_model

Data = dict[Hashable, Any]


class BoxPromptd(MapTransform):
    """Add ``boxes``, float32 (n, 4) on voxel edges, around the first region of a mask (R, X, Y, 1)."""

    def __init__(
        self, keys: str | Sequence[str], kind: str = "union", min_voxels: int = 1, box_key: str = "boxes"
    ) -> None:
        super().__init__(keys)
        self.kind, self.min_voxels, self.box_key = kind, min_voxels, box_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            mask = np.asarray(result[key])[0, :, :, 0]
            result[self.box_key] = boxes_from_mask(mask, self.kind, self.min_voxels)
            result[f"{self.box_key}_plane"] = mask.shape
        return result


class RandBoxJitterd(RandomizableTransform, MapTransform):
    """Jitter boxes by up to `limit_px` pixels of the model frame, for training; seed it with `set_random_state`.

    Parameters
    ----------
    keys : str or sequence of str
    limit_px : float
        In model pixels.
    image_size : int
        Side of the model frame.
    """

    def __init__(self, keys: str | Sequence[str] = "boxes", limit_px: float = 20.0, image_size: int = 1024) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, 1.0)
        self.limit_px, self.image_size = limit_px, image_size

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            plane = result[f"{key}_plane"]
            # MONAI seeds a RandomState per transform; one number of it seeds the generator that `jitter` takes.
            generator = np.random.default_rng(self.R.randint(2**31))
            scale = self.image_size / max(plane)
            result[key] = jitter(result[key], self.limit_px, scale, plane, generator)
        return result


class BoxesToModeld(MapTransform):
    """Bring boxes to SAM's (x0, y0, x1, y1) in the model frame, with the ``scale`` that the resize has left."""

    def __init__(self, keys: str | Sequence[str] = "boxes") -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Data:
        """See the class."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = to_model(result[key], result["scale"])
        return result
