"""Memory of the process: glibc's allocator settings and out-of-memory errors."""

import ctypes
import functools
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory that a training step frees for the next step, instead of returning it to the kernel.

    By default every larger CPU tensor is mapped again and each of its pages faulted in again, which takes half the time
    of a small model's step. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        # The backward pass runs on another thread and frees what the forward pass allocated: share one arena.
        libc.mallopt(_M_ARENA_MAX, 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
