"""Convert LSUN's databases to a folder of square PNG files, cropped as in improved-diffusion."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image

from fastdiff.data.archives import reading
from fastdiff.data.images import UnreadableImage, decode, fit
from fastdiff.data.lmdb_file import DamagedDatabase, Database
from fastdiff.data.threads import Progress, in_order
from fastdiff.runtime.files import whole
from fastdiff.runtime.words import printable


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
    after each image. Raises ValueError if the source is not such a database, or holds no readable image, and if ``out``
    is not empty.
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
        with _opened(source) as database:
            total = min(len(database), limit or len(database))
            with closing(in_order(save, enumerate(islice(database.values(), total)))) as results:
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


@contextmanager
def _opened(folder: Path) -> Iterator[Database]:
    """The database in a folder. ValueError, which names it, if there is none, or as soon as it turns out damaged."""
    file, name = folder / "data.mdb", printable(str(folder))
    if not file.is_file():
        raise ValueError(f"{folder} holds no data.mdb: give a folder like bedroom_train_lmdb, or its zip")
    try:
        with closing(Database(file)) as database:
            yield database
    except DamagedDatabase as error:
        raise ValueError(f"{name} is damaged or not an LMDB database ({error}): copy it again") from None
