"""The C shim that stands between a process and its files."""

import ctypes
import errno
import os
from enum import Enum
from pathlib import Path


class Hit(Enum):
    """What happens at a call: the shim's action, and the error that the call fails with."""

    NOTHING = (0, 0)
    KILLED_BEFORE = (1, 0)
    KILLED_AFTER = (2, 0)
    KILLED_HALFWAY = (3, 0)
    ENOSPC = (4, errno.ENOSPC)
    EIO = (4, errno.EIO)
    ENOSPC_FROM_THEN_ON = (5, errno.ENOSPC)
    EIO_FROM_THEN_ON = (5, errno.EIO)


WRITES = {"write", "pwrite", "pwrite64", "writev", "sendfile", "copy_file_range"}


def arm(folder: Path, at: int, hit: Hit) -> None:
    """Count the calls on files under ``folder`` from now on; the one of the number ``at``, from 1, is hit."""
    _library().shim_arm(os.fsencode(folder.resolve()), ctypes.c_long(at), *hit.value)


def calls() -> list[str]:
    """The names of the calls since ``arm(folder, 0, Hit.NOTHING)``."""
    function = _library().shim_names
    function.restype = ctypes.c_char_p
    return bytes(function()).decode().split()


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["LD_PRELOAD"])
