"""Several processes on one machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_OPENBLAS: Final = "OPENBLAS_NUM_THREADS"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def sharing_cores(processes: int) -> Iterator[None]:
    """Within this context, processes that are started give NumPy's OpenBLAS their share of the cores.

    Each with a thread for every core, they would wait for each other. OpenBLAS reads its environment when it is loaded,
    before a process could say so itself. A user's own choice stays.

    Parameters
    ----------
    processes : int
        How many there will be.

    Examples
    --------
    >>> with sharing_cores(10_000):
    ...     os.environ["OPENBLAS_NUM_THREADS"]
    '1'
    """
    if _OPENBLAS in os.environ:
        yield
        return
    os.environ[_OPENBLAS] = str(max(1, cores() // processes))
    try:
        yield
    finally:
        del os.environ[_OPENBLAS]
