"""One run folder, one process that writes to it."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from filelock import SoftFileLock, UnixFileLock

from fastdiff.runtime import lease
from fastdiff.runtime.lease import Lease

from ..processes import script

HOLD = """
from pathlib import Path
from fastdiff.runtime.lease import Lease
with Lease(Path(run_dir), "job 7"):
    channel.send("held")
    channel.recv()
"""


@contextmanager
def held(run_dir: Path) -> Iterator[BaseProcess]:
    """Another process, which holds the folder until the end."""
    process, channel = script(HOLD, run_dir=str(run_dir))
    assert channel.recv() == "held"
    yield process
    if process.is_alive():
        channel.send("end")
    process.join()


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    with held(run_dir) as process:
        says = rf"run is in use by process {process.pid} on {socket.gethostname()} since 20.*: stop it, or .*--run-dir"
        for _ in range(2):
            with pytest.raises(ValueError, match=says), Lease(run_dir):
                pass
        assert Lease.begun_by(run_dir) == "job 7"  # a refusal changes nothing
    with Lease(run_dir):
        pass


def test_the_lease_of_a_dead_process_is_free(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.kill()
        process.join()
    assert Lease.begun_by(tmp_path) == "job 7"  # known before the lease is taken
    with Lease(tmp_path, "job 8"), pytest.raises(ValueError, match=rf"process {os.getpid()} on"), Lease(tmp_path):
        pass
    assert Lease.begun_by(tmp_path) == "job 8"


@pytest.mark.parametrize("end", ["at its end", "by an exception"])
def test_what_stays_in_the_folder(tmp_path: Path, end: str) -> None:
    def run(launcher: str) -> None:
        with Lease(tmp_path, launcher):
            if end == "by an exception":
                raise KeyboardInterrupt

    for launcher, left in (("", {".lease"}), ("job 9", {".lease", ".lease.json"}), ("", {".lease"})):
        try:
            run(launcher)
        except KeyboardInterrupt:
            assert end == "by an exception"
        assert names(tmp_path) == left
        assert Lease.begun_by(tmp_path) == launcher
    assert (tmp_path / ".lease").stat().st_size == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"pid": 3}', "\udcff", "[" * 100_000])
def test_a_damaged_note_of_the_holder_holds_nobody_up(tmp_path: Path, text: str) -> None:
    with Lease(tmp_path, "job 7"):
        (tmp_path / ".lease.json").write_bytes(text.encode(errors="surrogateescape"))
        assert Lease.begun_by(tmp_path) == ""
        with pytest.raises(ValueError, match="in use by another process: stop it"), Lease(tmp_path):
            pass
    with Lease(tmp_path, "job 8"):
        assert Lease.begun_by(tmp_path) == "job 8"


def test_a_folder_that_nobody_ran_in_was_begun_by_nobody(tmp_path: Path) -> None:
    assert Lease.begun_by(tmp_path) == ""
    assert Lease.begun_by(tmp_path / "nowhere") == ""


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file cannot be written to \(File exists\): name another folder with --run-dir"):
        Lease(tmp_path / "file").__enter__()

    def read_only(*args: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(
        OSError, match=r"cannot be written to \(Read-only file system\): name another folder with --out"
    ):
        Lease(tmp_path / "run", option="--out").__enter__()


@pytest.mark.parametrize("how", ["a soft lock instead", "an exception"])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A soft lock is a file; a process that is killed would leave it, and nobody could go on with the run."""

    def acquire(self: UnixFileLock) -> None:
        if how == "an exception":
            raise NotImplementedError
        warnings.warn("falling back to SoftFileLock", stacklevel=1)
        self.__class__ = SoftFileLock
        self._acquire()

    monkeypatch.setattr(UnixFileLock, "_acquire", acquire)
    with pytest.raises(OSError, match=r"is on a file system without locks: .*--run-dir"):
        Lease(tmp_path).__enter__()
    assert names(tmp_path) == set()


def test_a_note_that_cannot_be_written_gives_the_lease_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lease, "replacing", full)
        with pytest.raises(OSError, match="No space left"):
            Lease(tmp_path).__enter__()
    with Lease(tmp_path):
        pass


def test_whether_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking leaves the folder as it is, and nobody waits; where the lock cannot be tried the holder's word counts."""
    assert not lease.held(tmp_path)
    assert not lease.held(tmp_path / "nowhere")
    assert names(tmp_path) == set()
    with Lease(tmp_path):
        assert lease.held(tmp_path)
    with held(tmp_path) as process:
        assert lease.held(tmp_path)
        process.kill()
        process.join()
    assert names(tmp_path) == {".lease", ".lease.json"}
    assert not lease.held(tmp_path)
    with Lease(tmp_path):  # free again
        pass
    monkeypatch.setattr(UnixFileLock, "_acquire", lambda self: os.stat(os.fspath(tmp_path / "denied")))
    assert not lease.held(tmp_path)
    (tmp_path / ".lease.json").write_text('{"pid": 1}')
    assert lease.held(tmp_path)
