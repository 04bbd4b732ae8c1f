"""How the process holds its memory."""

import ctypes
import functools
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h>


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one, instead of giving it back to the kernel.

    By default every larger tensor on the CPU is mapped afresh and each of its pages faulted in again, which takes half
    the time of a small model's step. Nothing happens with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        # The backward pass frees on its own thread what the forward pass allocated: one arena serves both.
        libc.mallopt(_M_ARENA_MAX, 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
