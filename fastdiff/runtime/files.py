"""Files and folders that appear complete under their names, or not at all."""

import errno
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastdiff.runtime.words import first_line

_HIDDEN = re.compile(r"\.(?P<of>.+)\.[a-z0-9_]{8}\.tmp")
_being_written: set[str] = set()  # random names, not paths: a folder can have several paths
_lock = threading.Lock()  # held to create or list folders: an existing one of this process is in the set


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a temporary path for ``path``, in a hidden folder beside it that is deleted in the end.

    The folder also holds the temporary files of the libraries that write: the names that safetensors chooses look like
    any other file's, and a killed process leaves these files behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        _being_written.add(Path(folder.name).name)
    try:
        with folder:
            yield Path(folder.name) / path.name
    finally:
        with _lock:
            _being_written.discard(Path(folder.name).name)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path on the disk of ``path``: on success it replaces ``path``, on failure it is deleted.

    The file is synced to the disk before the rename, and has the mode that the umask gives any new file.
    """
    with unfinished(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the default; safetensors' files are readable by their owner only
        yield temporary
        sync(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like ``replacing``, for a folder of a few files; if the rename fails, the folder that it replaces returns."""
    with unfinished(path) as temporary:
        yield temporary
        for inside in temporary.rglob("*"):
            if inside.is_file():
                sync(inside)
        replaced = temporary.with_name(f"{path.name}.replaced")
        try:
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
        sync(path.parent)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Like ``replacing``, for a new file or folder of any size at the path ``out`` that a user gave.

    A link is followed. Everything else in the hidden folder is deleted, too. Raises ValueError if ``out`` already
    exists and is not an empty folder, and if it cannot be written.
    """
    out = Path(os.path.realpath(os.path.expanduser(out)))
    with _disk_errors(out):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"{out} exists already: name another, or delete it first")
        for left in abandoned(out.parent, of=out.name):
            warnings.warn(f"{left} may be left from a killed run: delete it if no run is active", stacklevel=4)
        with unfinished(out) as temporary:
            yield temporary
            if hasattr(os, "sync"):  # not on Windows
                os.sync()  # flush the content before the rename; one sync is faster than a million fsyncs
            if out.is_dir():
                out.rmdir()  # Windows cannot rename over a folder
            temporary.rename(out)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Make disk errors name ``out``: the error of a full disk names no file, others name one in the hidden folder."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            where = Path(os.fsdecode(error.filename))
            if where not in (out, *out.parents) and not any(part.startswith(f".{out.name}.") for part in where.parts):
                raise
        reason = (error.strerror or first_line(error)).lower()
        raise ValueError(f"{out} cannot be written ({reason}): free space there, or choose another path") from error


def abandoned(folder: Path, of: str | None = None) -> list[Path]:
    """The hidden folders in ``folder``, or those of the file ``of``, that this process is not writing to."""
    with _lock:
        found = [(path, _HIDDEN.fullmatch(path.name)) for path in folder.glob(".*.tmp")]
        return [p for p, m in found if m and of in (None, m["of"]) and p.name not in _being_written]


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to the disk."""
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    elif hasattr(os, "O_DIRECTORY"):  # not on Windows, where a rename does not need it
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes; OSError if it is none, such as a pipe, which could block forever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb")


def existing(path: Path) -> Path:
    """The path itself or, if it does not exist, the nearest folder above it that does."""
    return next(place for place in (path, *path.parents) if place.exists())


def refuse_unwritable(option: str, wanted: Path) -> None:
    """ValueError, naming the option, if a folder is not writable, or does not exist and cannot be created."""
    folder = existing(wanted)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {wanted} cannot be written: {folder} is not a folder that you may write to")


_OTHER_KINDS = (
    (rb"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch that with git lfs pull"),
    (rb"\s*<(!doctype|html|\?xml)", "a web page, not the file itself: download that"),
    (rb"\x1f\x8b", "compressed: unpack it with gunzip"),
)


def other_kind(start: bytes) -> str | None:
    """What a file is instead of the expected one, and the remedy, if its first bytes show it."""
    return next((what for pattern, what in _OTHER_KINDS if re.match(pattern, start, re.IGNORECASE)), None)


def refuse_other_kind(path: Path) -> None:
    """ValueError, which says what it is, if a checkpoint's first bytes are those of another kind of file.

    An OSError is left to whoever reads the file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return
    if (what := other_kind(start)) is not None:
        raise ValueError(f"{path} is {what}")
    named = path.suffix == ".safetensors"
    if named and start.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a PyTorch file: rename it to end in .pt")
    if not named and re.match(rb".{7}\x00\{", start, re.DOTALL):
        raise ValueError(f"{path} is a safetensors file: rename it to end in .safetensors")
