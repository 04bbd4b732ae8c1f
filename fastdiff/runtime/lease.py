"""An exclusive lock on a folder: one process may write to it, until the process exits or dies."""

import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any, Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fastdiff.runtime.files import replacing

_LOCKED = ".lease"
_HOLDER = ".lease.json"  # describes the process that holds it


class Lease:
    """Locks a folder for this process; ValueError if another process holds it.

    The operating system releases the lock of a dead process. ``launcher`` identifies the job, so that a restart of the
    same job recognises itself: ``begun_by`` returns it. ``option`` is the flag that named the folder, "" if none did.
    """

    FILES = (_LOCKED, _HOLDER)
    """The files that a lease keeps in the folder."""

    def __init__(self, folder: Path, launcher: str = "", option: str = "--run-dir") -> None:
        self.folder = folder
        self.launcher = launcher
        self.option = option
        self._lock: BaseFileLock = FileLock(folder / _LOCKED)

    @staticmethod
    def begun_by(folder: Path) -> str:
        """The launcher of the folder's last holder, alive or not; empty if there was no holder or it named none."""
        return str(_holder(folder).get("launcher", ""))

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(action="ignore"):  # about the soft lock, which is refused below
                self._lock.acquire(timeout=0)
        except Timeout:
            holder, who = _holder(self.folder), "another process"
            if holder.keys() >= {"pid", "host", "since"}:
                who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
            other = f"name another folder with {self.option}" if self.option else "wait for its end"
            raise ValueError(f"{self.folder} is in use by {who}: stop it, or {other}") from None
        except NotImplementedError:
            raise self._no_locks() from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            if isinstance(self._lock, SoftFileLock):  # a plain file, which a killed process leaves behind
                raise self._no_locks()
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "launcher": self.launcher,
            }
            with replacing(self.folder / _HOLDER) as temporary:
                temporary.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError) and error.errno:
                raise self._unwritable(error) from None
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # A launcher may restart the job however it ended, and the restart then reads who started it.
        if not self.launcher:
            (self.folder / _HOLDER).unlink(missing_ok=True)
        # Keep the lock file: deleting it on a network file system could let two processes lock two files of this name,
        # one of them already deleted.
        self._lock.release()

    def _unwritable(self, error: OSError) -> OSError:
        other = f"name another folder with {self.option}" if self.option else "make it writable"
        return OSError(f"{self.folder} cannot be written to ({error.strerror}): {other}")

    def _no_locks(self) -> OSError:
        other = f"name a folder on another with {self.option}" if self.option else "move it to another"
        return OSError(f"{self.folder} is on a file system without locks: {other}")


def _holder(folder: Path) -> dict[str, Any]:
    try:
        holder = json.loads((folder / _HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def held(folder: Path) -> bool:
    """Whether a process holds the folder's lease; where the lock cannot be tried, whether one says that it does."""
    if not (folder / _LOCKED).exists():
        return False
    lock = FileLock(folder / _LOCKED)
    try:
        with warnings.catch_warnings(action="ignore"):
            lock.acquire(timeout=0)
    except Timeout:
        return True
    except (NotImplementedError, OSError):
        return bool(_holder(folder))
    lock.release()
    return False
