"""Read the files of a zip in place. Nothing that a zip claims about itself is trusted."""

import io
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from fastdiff.data.archives import named_in_zip, safe_file_name
from fastdiff.data.images import MAX_BYTES, UnreadableImage
from fastdiff.runtime.words import first_line

_WHOLE = 2**24  # bytes: larger members are not held in memory, but decompressed as they are read


@dataclass(frozen=True, eq=False)
class ZipMember:
    """A file in a zip. Any number of threads may open the members of one zip."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    most: int = MAX_BYTES

    def __str__(self) -> str:
        return f"{self.archive.filename}/{self.info.filename}"

    def open(self, mode: Literal["rb"] = "rb", /) -> BinaryIO:
        """Open the content; reading it to the end verifies its checksum.

        Raises UnreadableImage if the member is encrypted, compressed in an unknown way or larger than ``most`` bytes.
        """
        if self.info.flag_bits & 1:
            raise UnreadableImage(self, "encrypted")
        if self.info.file_size > self.most:
            raise UnreadableImage(self, f"over the limit of {self.most:,} bytes (16 for each of --max-pixels)")
        try:
            file = self.archive.open(self.info)
        except NotImplementedError:  # Deflate64, which Windows uses for large files, and rarer ones
            raise UnreadableImage(self, "compressed in a way that Python does not know: pack the zip again") from None
        if self.info.file_size > _WHOLE:
            return cast(BinaryIO, file)
        with file:
            return io.BytesIO(file.read())  # decoders seek back and forth


def zip_members(path: Path, most: int = MAX_BYTES) -> tuple[dict[str, ZipMember], list[str]]:
    """The files of a zip by name, without folders; those of more than ``most`` bytes cannot be opened.

    Of several files with one name the last counts, as when they are unpacked; also returns the names of the others.
    Raises ValueError if the zip is damaged or has unsafe names.
    """
    try:
        file = path.open("rb")
        try:
            # Pass an open file: ZipFile closes a file that it opened by a count of users that is not thread-safe.
            archive = zipfile.ZipFile(file)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({(error.strerror or 'damaged').lower()})") from None
    except Exception as error:  # zipfile raises nearly anything on damaged bytes
        raise ValueError(f"{path} is damaged or not a zip ({first_line(error)}): copy it again") from None
    weakref.finalize(archive, file.close)
    members: dict[str, ZipMember] = {}
    replaced: list[str] = []
    for info, said in named_in_zip(path, archive):
        if said.endswith("/"):  # is_dir() fails without a name
            continue
        name = safe_file_name(path, said)
        if name in members:
            replaced.append(name)
        members[name] = ZipMember(archive, info, most)
    return members, replaced
