"""A base model without its numbers: shapes alone, to count on. Needs neither weights nor memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from medsam_lora.models.sam import ARCHITECTURES, SamModel, fit_positions
from medsam_lora.models.weights import model_spec


def outline(name: str, image_size: int | None = None) -> SamModel:
    """A base model on the meta device.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    image_size : int, optional
        Side of the model frame; the model's own by default.

    Raises
    ------
    WeightsError
        For an unknown model.
    """
    spec = model_spec(name)
    with torch.device("meta"):
        model = SamModel(name, *ARCHITECTURES[name](), spec.image_size)
        fit_positions(model, spec.image_size if image_size is None else image_size)
    return model.eval()


def encoder_macs(model: SamModel, depth: int = 1) -> int:
    """Multiply-accumulate operations of the image encoder for one more image.

    Every matrix product and convolution counts, those of the attention (scores, relative positions, weighted values)
    included; additions, norms and activations do not. It is the difference between a batch of two and one of one, so
    that what is done once per forward pass, on weights alone, is not counted.

    Parameters
    ----------
    model : SamModel
        On the meta device.
    depth : int
        Slices that are encoded for one that is predicted.
    """
    one, two = (_count(model, n) for n in (depth, 2 * depth))
    return two - one


def _count(model: SamModel, n_images: int) -> int:
    size = model.image_size
    pixels = torch.empty(n_images, 3, size, size, device="meta")
    with torch.no_grad(), _Flops() as flops:
        model.encode(pixels)
    return flops.total // 2


class _Flops(TorchDispatchMode):
    """Adds up torch's own formulas, without the hooks on every module that `FlopCounterMode` pays for its tree."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
