"""Keeping freed memory in the process, so that a CPU does not fault the same pages in again at every layer.

glibc takes blocks above 32 MiB from the kernel and gives them back at once. The activations of an image encoder are
such blocks: without this, a third of the time of a forward pass on a CPU is the kernel clearing pages
(`benchmarks/allocator.py` measures it).
"""

from __future__ import annotations

import ctypes
import gc
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for reuse, for the rest of the process.

    Returns
    -------
    bool
        False where the C library is not glibc, where nothing is changed.

    Notes
    -----
    For the stages, which own their process; the library's functions never call it. The process's resident memory
    then stays at its peak until it ends.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    except (OSError, AttributeError):  # another C library, such as musl
        return False


def release_freed_memory() -> bool:
    """Give what is kept freed back to the kernel, so that a later peak of resident memory is of what comes after.

    Returns
    -------
    bool
        Whether something was given back; False where the C library is not glibc.
    """
    gc.collect()
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False
