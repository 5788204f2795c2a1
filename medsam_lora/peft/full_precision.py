"""Arithmetic on weights in their own precision, whatever autocast does to activations around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of a tensor.

    On the meta device, where models are built to be counted, there is no autocast to switch off.
    """
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
