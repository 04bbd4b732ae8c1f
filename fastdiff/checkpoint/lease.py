"""The right to write to a folder: one process has it, until it ends or dies."""

import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any, Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fastdiff.checkpoint.files import replacing

_LOCKED = ".lease"
_HOLDER = ".lease.json"  # a note of who it is


class Lease:
    """Holds a folder for the process; another one that wants it is refused by ValueError.

    The operating system takes it back from a process that is dead. ``launcher`` is what a restart of the same job
    would know itself by: ``begun_by`` gives it back. ``option`` is the flag that the folder was named with.
    """

    FILES = (_LOCKED, _HOLDER)
    """What it keeps in the folder."""

    def __init__(self, folder: Path, launcher: str = "", option: str = "--run-dir") -> None:
        self.folder = folder
        self.launcher = launcher
        self.option = option
        self._lock: BaseFileLock = FileLock(folder / _LOCKED)

    @staticmethod
    def begun_by(folder: Path) -> str:
        """The launcher of the folder's last holder, alive or not; empty where it named none, or there was none."""
        return str(_holder(folder).get("launcher", ""))

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(action="ignore"):  # of the soft lock, which is refused below
                self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by {_describe(_holder(self.folder))}: stop it, or name another folder "
                f"with {self.option}"
            ) from None
        except NotImplementedError:
            raise self._no_locks() from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            if isinstance(self._lock, SoftFileLock):  # a file that a process leaves behind when it is killed
                raise self._no_locks()
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "launcher": self.launcher,
            }
            with replacing(_holder_path(self.folder)) as temporary:
                temporary.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError) and error.errno:
                raise self._unwritable(error) from None
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # A launcher may start the job again, however it ended, and then asks who began it.
        if not self.launcher:
            _holder_path(self.folder).unlink(missing_ok=True)
        # The file that is locked stays: to delete it would, on a network's disk, let two processes lock two files of
        # that name, one of which is already deleted.
        self._lock.release()

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(f"{self.folder} cannot be written to ({error.strerror}): name another folder with {self.option}")

    def _no_locks(self) -> OSError:
        return OSError(f"{self.folder} is on a file system without locks: name a folder on another with {self.option}")


def _holder_path(folder: Path) -> Path:
    return folder / _HOLDER


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads(_holder_path(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder.keys() >= {"pid", "host", "since"}:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
