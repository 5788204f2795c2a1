"""Autocast by name, and what ``auto`` means on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

AMP_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Without one of these a CPU emulates bfloat16, several times slower than float32.
_CPU_FLAGS: Final = {"avx512_bf16", "amx_bf16"}


def resolve_amp(amp: str, device: torch.device) -> str:
    """What an `amp` setting means on a device.

    Parameters
    ----------
    amp : str
        ``none``, ``tf32``, ``bf16``, ``fp16``, or ``auto``: bf16 where the hardware computes in it, else none.
    device : torch.device

    Returns
    -------
    str
        ``none``, ``tf32``, ``bf16`` or ``fp16``. ``tf32`` is none but on CUDA, as nothing else computes in it.

    Examples
    --------
    >>> resolve_amp("none", torch.device("cpu"))
    'none'
    """
    if amp == "tf32":
        return "tf32" if device.type == "cuda" else "none"
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    return "bf16" if device.type == "cpu" and _CPU_FLAGS & cpu_flags() else "none"


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this machine's processor, as Linux names them; empty on other systems."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """The autocast context of an `amp` setting on a device (a null context for ``none`` and ``tf32``)."""
    dtype = AMP_DTYPES.get(resolve_amp(amp, device))
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def float32_products(device: torch.device, amp: str) -> Iterator[None]:
    """Within this context float32 products on CUDA are formed in TF32 where `amp` says so, and else in float32.

    By default torch multiplies matrices in float32 and convolves in TF32; here one setting means both. What was set
    before is put back. TensorFloat-32 keeps 10 bits of the mantissa and adds up in float32 (NVIDIA A100 white paper).

    Parameters
    ----------
    device : torch.device
        On another device than CUDA nothing is changed.
    amp : str
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = resolve_amp(amp, device) == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
