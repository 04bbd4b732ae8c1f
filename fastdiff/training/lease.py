"""The right to write to a run folder: one process has it, until it ends or dies."""

import json
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any, Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from fastdiff.checkpoint import replacing


class Lease:
    """Holds a run folder for the process; another one that wants it is refused by ValueError.

    The operating system takes it back from a process that is dead. ``launcher`` is what a restart of the same job
    would know itself by: ``begun_by`` gives it back.
    """

    def __init__(self, run_dir: Path, launcher: str = "") -> None:
        self.run_dir = run_dir
        self.launcher = launcher
        self._lock: BaseFileLock = FileLock(run_dir / ".lease")

    @staticmethod
    def begun_by(run_dir: Path) -> str:
        """The launcher of the folder's last holder, alive or not; empty where it named none, or there was none."""
        return str(_holder(run_dir).get("launcher", ""))

    def __enter__(self) -> Self:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings(action="ignore"):  # of the soft lock, which is refused below
                self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.run_dir} is in use by {_describe(_holder(self.run_dir))}: stop it, or name another folder "
                "with --run-dir"
            ) from None
        except NotImplementedError:
            raise _no_locks(self.run_dir) from None
        except OSError as error:
            raise OSError(
                f"{self.run_dir} cannot be written to ({error.strerror}): name another folder with --run-dir"
            ) from None
        try:
            if isinstance(self._lock, SoftFileLock):  # a file that a process leaves behind when it is killed
                raise _no_locks(self.run_dir)
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "launcher": self.launcher,
            }
            with replacing(_holder_path(self.run_dir)) as temporary:
                temporary.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        # A launcher may start the job again, however it ended, and then asks who began it.
        if not self.launcher:
            _holder_path(self.run_dir).unlink(missing_ok=True)
        # The file that is locked stays: to delete it would, on a network's disk, let two processes lock two files of
        # that name, one of which is already deleted.
        self._lock.release()


def _no_locks(run_dir: Path) -> OSError:
    return OSError(f"{run_dir} is on a file system without locks: name a folder on another one with --run-dir")


def _holder_path(run_dir: Path) -> Path:
    return run_dir / ".lease.json"


def _holder(run_dir: Path) -> dict[str, Any]:
    try:
        holder = json.loads(_holder_path(run_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder.keys() >= {"pid", "host", "since"}:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
