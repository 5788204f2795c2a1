"""The base models. Importing this package needs no torch; `models.sam.build` does the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ModelSpec:
    """A base model.

    Parameters
    ----------
    name : str
    summary : str
    image_size : int
        Side of the model frame its weights were trained on, in pixels.
    parameters : int
        Of the whole model.
    file_name : str or None
        Name of the official checkpoint file; None where there is none.
    url, sha256 : str or None
        Where it is published, and its hash. A model with a file and no URL has its weights in this package.
    notice : str or None
        What must be said of the model wherever it is used.
    """

    name: str
    summary: str
    image_size: int
    parameters: int
    file_name: str | None = None
    url: str | None = None
    sha256: str | None = None
    notice: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether the weights are part of this package."""
        return self.file_name is not None and self.url is None


_META = "https://dl.fbaipublicfiles.com/segment_anything/"

MODELS: Final[Mapping[str, ModelSpec]] = {
    "vit_b": ModelSpec(
        "vit_b",
        "SAM ViT-B",
        1024,
        93_735_472,
        "sam_vit_b_01ec64.pth",
        _META + "sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": ModelSpec(
        "vit_l",
        "SAM ViT-L",
        1024,
        312_342_832,
        "sam_vit_l_0b3195.pth",
        _META + "sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": ModelSpec(
        "vit_h",
        "SAM ViT-H",
        1024,
        641_090_608,
        "sam_vit_h_4b8939.pth",
        _META + "sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    "vit_t": ModelSpec(
        "vit_t",
        "MobileSAM: TinyViT encoder, SAM's prompt encoder and mask decoder",
        1024,
        9_808_452,
        "mobile_sam.pt",
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
    "vit_nano": ModelSpec(
        "vit_nano",
        "SAM's own classes at 256 px, pre-trained on synthetic scenes; for demonstration and tests, not for patients",
        256,
        3_846_912,
        "vit_nano.safetensors",
        None,
        "b92cd7040a837cd04599a8ea8effe7e5b32dc17f696490719f183a48c5c5a6b0",
        "vit_nano is for demonstration and tests, not for patients",
    ),
}
"""The base models by name."""
