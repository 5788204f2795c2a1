"""The classes of the `segment_anything` package, without torchvision.

``import segment_anything`` runs an ``__init__`` that needs torchvision (for its predictor and its automatic mask
generator), of which no build exists beside a CPU torch. Its ``modeling`` and ``build_sam`` need torch alone. So the
package is entered in `sys.modules` from its specification without running its ``__init__``, the same way on every
machine, with or without a working torchvision.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def _enter_package_without_init() -> None:
    if "segment_anything" in sys.modules:
        return  # somebody imported the whole package: its torchvision works
    spec = importlib.util.find_spec("segment_anything")
    if spec is None:
        raise ImportError("segment-anything is not installed: pip install segment-anything==1.0")
    package: ModuleType = importlib.util.module_from_spec(spec)

    def explain(name: str) -> object:
        raise AttributeError(
            f"segment_anything.{name} is not loaded: medsam-lora uses segment_anything.modeling and .build_sam only, "
            "because the package's __init__ needs a torchvision built for this torch"
        )

    package.__getattr__ = explain  # type: ignore[method-assign]
    sys.modules["segment_anything"] = package


_enter_package_without_init()

from segment_anything.build_sam import build_sam_vit_b, build_sam_vit_h, build_sam_vit_l  # noqa: E402
from segment_anything.modeling import (  # noqa: E402
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d  # noqa: E402
from segment_anything.modeling.image_encoder import (  # noqa: E402
    Attention,
    add_decomposed_rel_pos,
    window_partition,
    window_unpartition,
)

__all__ = [
    "Attention",
    "ImageEncoderViT",
    "LayerNorm2d",
    "MaskDecoder",
    "PromptEncoder",
    "Sam",
    "TwoWayTransformer",
    "add_decomposed_rel_pos",
    "build_sam_vit_b",
    "build_sam_vit_h",
    "build_sam_vit_l",
    "window_partition",
    "window_unpartition",
]
