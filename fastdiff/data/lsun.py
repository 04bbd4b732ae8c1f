"""Convert LSUN's databases to a folder of square PNG files, cropped as in improved-diffusion."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image

from fastdiff.data.archives import reading
from fastdiff.data.images import UnreadableImage, decode, fit
from fastdiff.data.threads import Progress, in_order
from fastdiff.runtime.files import whole
from fastdiff.runtime.words import first_line, printable


def prepare_lsun(
    source: Path,
    out: Path,
    image_size: int = 256,
    prefix: str = "bedroom",
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[int, int]:
    """Write out/bedroom_0000000.png and so on; returns the number of images written and of unreadable ones.

    ``source`` is a folder like bedroom_train_lmdb, or the zip that it comes in. Images are numbered in the order of
    their keys, including unreadable ones; ``limit`` takes only the first ones. ``on_progress(done, total)`` is called
    after each image. Raises ValueError if lmdb is not installed, if the source is not such a database or holds no
    readable image, and if ``out`` is not empty.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be positive, not {image_size}")
    if not prefix.isprintable() or not prefix or prefix.startswith(".") or "/" in prefix or "\\" in prefix:
        raise ValueError(f"prefix must be a valid start of a visible file name, not {prefix!r}")
    with whole(out) as folder:
        folder.mkdir()

        def save(item: tuple[int, bytes]) -> bool:
            i, content = item
            try:
                image = decode(_Value(f"image {i}", content))
            except UnreadableImage:
                return False
            Image.fromarray(fit(image, image_size, Image.Resampling.BOX)).save(folder / f"{prefix}_{i:07d}.png")
            return True

        if not source.is_dir():
            source = _unpacked(source, folder.parent / "database")
        written = 0
        with closing(_Database(source)) as database, closing(database.values()) as values:
            total = min(len(database), limit or len(database))
            with closing(in_order(save, enumerate(islice(values, total)))) as results:
                for done, saved in enumerate(results, start=1):
                    written += saved
                    if on_progress is not None:
                        on_progress(done, total)
        if not written:
            raise ValueError(f"{source} holds no readable image among {total:,}")
    return written, total - written


def _unpacked(source: Path, folder: Path) -> Path:
    """Unpack the database of a zip to the temporary ``folder``."""
    with reading(source) as members:
        for member in members:
            if member.name.rpartition("/")[2] == "data.mdb":
                member.write(folder / "data.mdb")
                return folder
    raise ValueError(f"{source} holds no data.mdb: give a zip of LSUN, or the folder in it")


@dataclass(frozen=True)
class _Value:
    """An encoded image from the database."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        return BytesIO(self.content)


class _Database:
    """The values of an LMDB folder in the order of their keys. Nothing is written to it, not even a lock file."""

    def __init__(self, folder: Path) -> None:
        try:
            import lmdb
        except ImportError:
            raise ValueError("lsun needs lmdb: pip install lmdb (extra 'lsun')") from None
        if not (folder / "data.mdb").is_file():
            raise ValueError(f"{folder} holds no data.mdb: give a folder like bedroom_train_lmdb, or its zip")
        self._folder, self._error = folder, lmdb.Error
        try:
            self._open = lmdb.open(str(folder), readonly=True, lock=False, create=False)
        except lmdb.Error as error:
            raise self._damaged(error) from None
        promised = (self._open.info()["last_pgno"] + 1) * self._open.stat()["psize"]
        if promised > (length := (folder / "data.mdb").stat().st_size):  # reading past its end kills the process
            self._open.close()
            raise ValueError(f"{folder} is incomplete: data.mdb has {length:,} of {promised:,} bytes: copy it again")

    def __len__(self) -> int:
        return int(self._open.stat()["entries"])

    def values(self) -> Generator[bytes, None, None]:
        found = 0
        try:
            with self._open.begin() as transaction, transaction.cursor() as cursor:
                for value in cursor.iternext(keys=False):
                    found += 1
                    yield value
        except self._error as error:
            raise self._damaged(error) from None
        if found != len(self):  # LMDB has no checksums: a damaged page may end the walk early
            raise self._damaged(ValueError(f"{found:,} of {len(self):,} values are found"))

    def close(self) -> None:
        self._open.close()

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{printable(str(self._folder))} is damaged or not an LMDB database ({first_line(error)})")
