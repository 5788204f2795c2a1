"""Autocast by name, and what ``auto`` means on a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
        ``none``, ``bf16``, ``fp16``, or ``auto``: bf16 where the hardware computes in it, else none.
    device : torch.device

    Returns
    -------
    str
        ``none``, ``bf16`` or ``fp16``.

    Examples
    --------
    >>> resolve_amp("none", torch.device("cpu"))
    'none'
    """
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
    """The autocast context of an `amp` setting on a device (a null context for ``none``)."""
    resolved = resolve_amp(amp, device)
    return nullcontext() if resolved == "none" else torch.autocast(device.type, AMP_DTYPES[resolved])
