"""Layers drawn from a generator of their own: constructors of torch draw from the global one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def draw_linear(n_in: int, n_out: int, like: Tensor, generator: torch.Generator | None) -> nn.Linear:
    """A Linear as torch starts it (uniform up to ``1 / sqrt(n_in)``), or of zeros without a generator.

    Parameters
    ----------
    n_in, n_out : int
    like : Tensor
        Gives device and type. Values are drawn on the CPU, the same for every device.
    generator : torch.Generator, optional
    """
    layer = nn.Linear(n_in, n_out, device="meta")
    _fill(layer, n_in, like, generator)
    return layer


def draw_convolution(
    n_in: int, n_out: int, kernel: int, like: Tensor, generator: torch.Generator, *, groups: int = 1, bias: bool = True
) -> nn.Conv2d:
    """A convolution that keeps the grid, as torch starts it; see `draw_linear`."""
    layer = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2, groups=groups, bias=bias, device="meta")
    _fill(layer, n_in // groups * kernel**2, like, generator)
    return layer


def bottleneck(width: int, inner: int, act: nn.Module, like: Tensor, generator: torch.Generator) -> nn.Sequential:
    """``W_up act(W_down x + b_down) + b_up`` with W_up and b_up zero, so that it starts as adding nothing.

    Parameters
    ----------
    width, inner : int
        Features outside and inside: ``2 width inner + inner + width`` parameters.
    act : Module
    like : Tensor
        Gives device and type.
    generator : torch.Generator
    """
    down, up = draw_linear(width, inner, like, generator), draw_linear(inner, width, like, None)
    return nn.Sequential(down, act, up)


def bottleneck_count(width: int, inner: int) -> int:
    """Parameters of a `bottleneck`.

    Examples
    --------
    >>> 24 * bottleneck_count(768, 64)
    2379264
    """
    return 2 * width * inner + inner + width


def _fill(layer: nn.Linear | nn.Conv2d, fan_in: int, like: Tensor, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(fan_in)
    for name, parameter in list(layer.named_parameters()):
        values = torch.zeros(parameter.shape)
        if generator is not None:
            values.uniform_(-bound, bound, generator=generator)
        setattr(layer, name, nn.Parameter(values.to(like)))
