"""Memory of the process: freed memory is kept, and what says that there is none is known.

glibc takes blocks above 32 MiB from the kernel and gives them back at once. The activations of an image encoder are
such blocks: without keeping them, a third of the time of a forward pass on a CPU is the kernel clearing pages
(`benchmarks/allocator.py` measures it).
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Final

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


# Of the CPU's allocator (c10/core/impl/alloc_cpu.cpp) and of CUDA's libraries, whose errors have no class of their own.
_OUT_OF_MEMORY: Final = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the device or on the host.

    Examples
    --------
    >>> is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"))
    True
    >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    False
    """
    # torch's own class by its name: this module is imported where torch is not.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
