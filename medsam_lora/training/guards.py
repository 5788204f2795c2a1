"""What surrounds a training run: determinism, Ctrl-C between updates, and the memory it took."""

from __future__ import annotations

import logging
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from medsam_lora.models.allocator import release_freed_memory

logger = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# Of proc(5): the peak of the resident set becomes what is resident now.
_RESET_PEAK = "5"


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process since `reset_peak_memory`: of the GPU on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_mib` anew, as several runs in one process would else all show the peak of the largest so far.

    Where the kernel does not let a process do so (other systems than Linux), the peak stays that of the process.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    release_freed_memory()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        logger.debug("the peak of memory cannot be reset here: it is that of the whole process")


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels where torch has them, a warning where it has none; the settings before are put back."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_before = torch.is_deterministic_algorithms_warn_only_enabled()
    # On by default with deterministic kernels: every new tensor would be written once more. Nothing here reads memory
    # that it has not written.
    settings: Any = torch.utils.deterministic  # whose one attribute is made by its class
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before, warn_only=warn_before)


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is read between updates; a second one stops at once."""
    hits = 0

    def note(signum: int, frame: Any) -> None:
        nonlocal hits
        hits += 1
        if hits > 1:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield lambda: False
        return
    try:
        yield lambda: hits > 0
    finally:
        signal.signal(signal.SIGINT, before)
