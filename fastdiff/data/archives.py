"""Sequential reading of image archives."""

import errno
import gzip
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from fastdiff.data.threads import Progress
from fastdiff.runtime.words import first_line, printable

_CHUNK = 2**20  # bytes per read; no valid name is longer
DEFLATE_RATIO = 1032  # the maximum: two bits encode 258 bytes; no image compresses further in any format

_END_MARK, _END_OF_ZIP = b"PK\5\6", 22  # bytes, before the comment
_IN_ZIP64 = 0xFFFF  # another record has the number


class ArchiveError(ValueError):
    """An archive cannot be used; the text says why, and the remedy."""


def safe_name(archive: Path, name: str) -> str:
    """A member's name relative to the archive's root, with "/"; ArchiveError if it leads out of the root.

    The name of the root itself, which a tar of "." contains, is empty.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in re.split(r"[/\\]", name) or re.match("[A-Za-z]:", name):
        raise ArchiveError(
            f"{archive} holds {printable(name)}, a name that leads out of its folder: do not use it, or pack it again"
        )
    if "\\" in name:
        raise ArchiveError(
            f"{archive} holds {printable(name)}, and a backslash is part of a name on some systems and ends a folder "
            "on others: pack it again with slashes"
        )
    return "/".join(part for part in parts if part not in ("", "."))


def named_in_zip(path: Path, archive: zipfile.ZipFile) -> list[tuple[zipfile.ZipInfo, str]]:
    """The members of a zip with their names, which are not yet safe; those of folders end with "/".

    Where no name has a slash, backslashes are taken for slashes: some programs on Windows write them, although ZIP's
    specification (4.4.17) does not allow it. ArchiveError for names that zipfile cuts off, folders with content, and if
    there are not as many members as the zip says.
    """
    infos = archive.infolist()
    if lacking := missing_files(archive):
        raise ArchiveError(f"{path} is damaged: {lacking}; copy it again")
    slashes = any("/" in info.filename for info in infos)
    names = [info.filename if slashes else info.filename.replace("\\", "/") for info in infos]
    for info, name in zip(infos, names, strict=True):
        if "\0" in info.orig_filename or (name.endswith("/") and info.file_size):
            what = "a damaged name" if "\0" in info.orig_filename else "a folder with content"
            raise ArchiveError(f"{path} holds {printable(info.orig_filename)}, {what}: copy it again")
    return list(zip(infos, names, strict=True))


def missing_files(archive: zipfile.ZipFile) -> str:
    """How many files of a zip are not found, in words, by the number in its end, which zipfile ignores; or nothing.

    The number is modulo 2^16 (ZIP's specification, 4.3.16).
    """
    assert archive.fp is not None
    length = archive.fp.seek(0, os.SEEK_END)
    archive.fp.seek(max(0, length - _END_OF_ZIP - 2**16))  # a comment, or bytes that do not belong to it, may follow
    tail = archive.fp.read()
    bare = tail[-_END_OF_ZIP:]
    at = len(tail) - _END_OF_ZIP if bare[:4] == _END_MARK and bare[-2:] == b"\0\0" else tail.rfind(_END_MARK)
    said, found = int.from_bytes(tail[at + 10 : at + 12], "little"), len(archive.infolist())
    return "" if said in (_IN_ZIP64, found % 2**16) else f"{found:,} of its {said:,} files are found"


def safe_file_name(archive: Path, name: str) -> str:
    """Like safe_name, for a file, whose name must not be empty."""
    if not (safe := safe_name(archive, name)):
        raise ArchiveError(f"{archive} holds a file without a name: pack it again")
    return safe


@dataclass(frozen=True)
class Member:
    """A regular file of an archive: its name below the archive's root, its length in bytes, and how to open it.

    It can be opened only until the next member is requested.
    """

    archive: Path
    name: str
    size: int
    open: Callable[[], IO[bytes]]

    def parts(self) -> Iterator[bytes]:
        """The content in chunks. Raises ArchiveError if it is damaged."""
        with _explained(self.archive):
            file = self.open()
        with file:
            while True:
                with _explained(self.archive):
                    part = file.read(_CHUNK)
                if not part:
                    return
                yield part

    def read(self, most: int) -> bytes:
        """The content. Raises ArchiveError if it is damaged or longer than ``most`` bytes; the rest is not read."""
        content = bytearray()
        for part in self.parts():
            content += part
            if len(content) > most:
                raise ArchiveError(
                    f"{self.archive} holds {printable(self.name)} of more than {most:,} bytes, which is too large: "
                    "copy it again"
                )
        return bytes(content)

    def write(self, path: Path) -> None:
        """Unpack to a new file. Raises ArchiveError if the content is damaged, or the path is taken or invalid."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            target = path.open("xb")
        except (FileExistsError, NotADirectoryError):
            how = "twice" if path.is_file() else "as a file and as a folder"
            raise ArchiveError(
                f"{self.archive} holds {printable(self.name)} {how}: do not use it, or pack it again"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: the file system cannot encode the name
            if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.EINVAL):
                raise
            raise ArchiveError(
                f"{self.archive} holds {printable(self.name)[:100]}, a name that is invalid here: "
                "do not use it, or pack it again"
            ) from None
        with target:
            for part in self.parts():
                target.write(part)


@contextmanager
def reading(path: Path, on_progress: Progress | None = None) -> Iterator[Iterator[Member]]:
    """Iterate over the files of a tar, tar.gz or zip in the order in which they are stored.

    ``on_progress(done, total)`` is called before each member with the bytes of the archive read so far. Raises
    ValueError if there is no file, and ArchiveError if the archive is damaged or truncated, or holds names that lead
    out of it, links, devices, sparse or encrypted files: discard whatever was extracted until then.
    """
    if not path.is_file():  # a pipe cannot be read twice
        what = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: give the archive, or the folder that it was unpacked to")
    with path.open("rb") as raw:
        total = os.fstat(raw.fileno()).st_size

        def followed() -> Iterator[Member]:
            for member in _stepped(path, _members(path, raw)):
                if on_progress is not None:
                    on_progress(min(raw.tell(), total), total)
                yield member

        yield followed()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise errors as ArchiveError: on damaged bytes tarfile, zipfile and their decompressors raise nearly anything."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:
        raise ArchiveError(
            f"{path} is damaged, incomplete or not a tar, tar.gz or zip ({first_line(error)}): copy it again"
        ) from None


def _stepped(path: Path, members: Generator[Member, None, None]) -> Generator[Member, None, None]:
    """The members. Errors while advancing to one become ArchiveError; errors in the caller's code do not."""
    with closing(members):
        while True:
            with _explained(path):
                member = next(members, None)
            if member is None:
                return
            yield member


def tar_in(member: Member) -> Generator[Member, None, None]:
    """The files of a tar nested in an archive."""

    def members() -> Generator[Member, None, None]:
        with member.open() as file:
            yield from _tar_members(member.archive, file)

    return _stepped(member.archive, members())


def _tar_members(path: Path, file: IO[bytes]) -> Generator[Member, None, None]:
    reader, place = _Reader(file), -1
    with tarfile.open(fileobj=reader, mode="r:") as tar:  # type: ignore[call-overload]
        while (info := tar.next()) is not None:
            tar.members.clear()  # a million of them would take more than a GiB
            if info.size < 0 or info.offset <= place:  # it would seek back and loop forever
                raise tarfile.ReadError("a negative size")
            place = info.offset
            if info.issparse():  # a few bytes can expand to any number of GiB
                raise _refused(path, info.name, "a sparse file")
            if info.isreg():
                yield Member(path, safe_file_name(path, info.name), info.size, partial(_extract, tar, info))
            else:
                name = safe_name(path, info.name)
                if not info.isdir():
                    raise _refused(path, name, "a link or a device")
        # tarfile takes nearly anything for the end: its last read must be the block of zeros that ends a tar
        if reader.last.strip(b"\0") or len(reader.last) != tarfile.BLOCKSIZE:
            raise EOFError("it has no end marker")
    while part := file.read(_CHUNK):
        if part.strip(b"\0"):  # tars that were joined with cat, or a tar with bytes inserted: the rest would be lost
            raise ArchiveError(
                f"{path} holds a tar with more behind its end: copy it again, or unpack it (tar -i) and pack it again"
            )


def _members(path: Path, raw: IO[bytes]) -> Generator[Member, None, None]:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"PK"):
        with zipfile.ZipFile(raw) as archive:
            yield from _zip_members(path, archive)
    elif magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield from _tar_members(path, cast(IO[bytes], unpacked))
            while unpacked.read(_CHUNK):  # to the end, where the checksum is verified
                pass
    else:
        yield from _tar_members(path, raw)


def _zip_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    members = sorted(named_in_zip(path, archive), key=lambda member: member[0].header_offset)
    if sum(info.compress_size for info, _ in members) > path.stat().st_size:
        raise zipfile.BadZipFile("its files overlap")
    for info, said in members:
        folder = said.endswith("/")
        name = (safe_name if folder else safe_file_name)(path, said)
        mode = info.external_attr >> 16
        if info.flag_bits & 1:
            raise ArchiveError(
                f"{path} holds {printable(name)}, which is encrypted: unpack it and pack it again without a password"
            )
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refused(path, name, "a link or a device")
        most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO)
        if info.file_size > most:
            raise zipfile.BadZipFile(f"{name} claims to be larger than its {info.compress_size:,} bytes can hold")
        if not folder:
            yield Member(path, name, info.file_size, partial(archive.open, info))


def _extract(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, info  # None only for links, devices and folders
    return file


def _refused(path: Path, name: str, what: str) -> ArchiveError:
    return ArchiveError(f"{path} holds {printable(name)}, {what}: do not use it, or pack it again without it")


class _Reader:
    """The file that tarfile reads; it refuses large reads, which only a damaged or malicious archive requests."""

    def __init__(self, file: IO[bytes]) -> None:
        self.last = b""
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise tarfile.ReadError(f"a name of {size:,} bytes")
        self.last = self._file.read(size)
        return self.last
