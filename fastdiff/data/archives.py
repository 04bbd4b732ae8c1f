"""Archives of images, read from the beginning to the end, and folders and files that are whole or not there."""

import gzip
import os
import shutil
import stat
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from fastdiff.data.words import printable
from fastdiff.data.zipped import first_line, safe_name

Progress = Callable[[int, int], None]

_CHUNK = 2**20  # bytes that are read at once; names that are longer do not exist
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: its name below the archive's root, its length in bytes, and how to open it.

    It can be opened until the next one is asked for.
    """

    archive: Path
    name: str
    size: int
    open: Callable[[], IO[bytes]]

    def write(self, path: Path) -> None:
        """Unpack it to a new file. Raises ValueError where it is damaged, and where the file is there already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _explained(self.archive), self.open() as source, path.open("xb") as target:
                shutil.copyfileobj(source, target, _CHUNK)
        except FileExistsError:
            raise ValueError(
                f"{self.archive} holds {printable(self.name)} twice: do not use it, or pack it again"
            ) from None


@contextmanager
def reading(path: Path, on_progress: Progress | None = None) -> Iterator[Iterator[Member]]:
    """The files of a tar, tar.gz or zip, one after the other as they lie in it.

    ``on_progress(done, total)`` is called with the bytes of the archive that were read, before each member. Raises
    ValueError for an archive that is damaged or cut short, or holds names that lead out of it, links, devices or
    encrypted files: what was made of it until then is not to be kept.
    """
    with path.open("rb") as raw, _explained(path):
        yield _followed(_members(path, raw), raw, on_progress)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged, incomplete or no tar, tar.gz or zip ({first_line(error)}): copy it again"
        ) from None


def tar_members(path: Path, file: IO[bytes]) -> Iterator[Member]:
    """The regular files of a tar, which may be a member of ``path``; within ``reading``."""
    reader = _Reader(file)
    with tarfile.open(fileobj=reader, mode="r:") as tar:  # type: ignore[call-overload]
        while (info := tar.next()) is not None:
            tar.members.clear()  # a million of them would take more than a GiB
            name = safe_name(path, info.name)
            if info.isreg():
                yield Member(path, name, info.size, partial(_extract, tar, info))
            elif not info.isdir():
                raise _refused(path, name)
        # tarfile takes nearly anything for the end: what it read last must be what ends a tar
        if reader.last.strip(b"\0") or len(reader.last) != tarfile.BLOCKSIZE:
            raise EOFError("it has no end")


def _members(path: Path, raw: IO[bytes]) -> Iterator[Member]:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(raw) as archive:
            yield from _zip_members(path, archive)
    elif magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield from tar_members(path, cast(IO[bytes], unpacked))
            while unpacked.read(_CHUNK):  # to the end: there is the checksum
                pass
    else:
        yield from tar_members(path, raw)


def _zip_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = safe_name(path, info.filename)
        mode = info.external_attr >> 16
        if info.flag_bits & 1:
            raise ValueError(
                f"{path} holds {printable(name)}, which is encrypted: unpack it and pack it again without a password"
            )
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(path, name)
        if not info.is_dir():
            yield Member(path, name, info.file_size, partial(archive.open, info))


def _followed(members: Iterator[Member], raw: IO[bytes], on_progress: Progress | None) -> Iterator[Member]:
    total = os.fstat(raw.fileno()).st_size
    for member in members:
        if on_progress is not None:
            on_progress(min(raw.tell(), total), total)
        yield member


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, info  # of a regular file
    return file


def _refused(path: Path, name: str) -> ValueError:
    return ValueError(f"{path} holds {printable(name)}, a link or a device: do not use it, or pack it again without")


class _Reader:
    """What tarfile reads from: never much at once, which only damage or malice asks for."""

    def __init__(self, file: IO[bytes]) -> None:
        self.last = b""
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int) -> bytes:
        if size > _CHUNK:
            raise tarfile.ReadError(f"a name of {size:,} bytes")
        self.last = self._file.read(size)
        return self.last


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path in a hidden folder beside ``out`` to make a file or folder at; on success it becomes out, else is gone.

    Whatever else is made in that hidden folder is gone at the end, too. Raises ValueError where out is there already
    and is not an empty folder.
    """
    out = out.expanduser().absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} exists already: name another, or delete it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.*.tmp"):
        warnings.warn(f"{left} may be left from a run that was killed: delete it if none is at work", stacklevel=3)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as name:
        folder = Path(name)
        yield folder / out.name
        if hasattr(os, "sync"):  # not on Windows
            os.sync()  # the content is on the disk before it has its name; of a million files not one by one
        if out.is_dir():
            out.rmdir()  # Windows replaces no folder
        (folder / out.name).rename(out)
