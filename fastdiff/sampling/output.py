"""Writes samples: an npz for the ADM evaluator, a preview grid, PNGs, a trajectory."""

import math
import unicodedata
import zipfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, features

from fastdiff.runtime.files import replacing
from fastdiff.runtime.words import printable

Uint8Array = NDArray[np.uint8]

GAP = 2
"""Pixels between a grid's images, before they are enlarged."""

CELL = 64
"""Pixels that each image of a grid has at least in width and height, after it is enlarged."""

MOST_COLUMNS = 16
"""A grid has one column per class, up to this many classes."""

MOST_LINES = 6
"""Most lines of a name in a grid; a longer name is shortened."""

HELD = 1.5
"""Seconds for which a GIF shows its last frame."""

FRAME = 0.04
"""Minimum seconds for which a GIF shows any other frame: viewers slow down much shorter frames."""


def save_npz(path: Path, batches: Iterable[Uint8Array], shape: tuple[int, int, int, int], **arrays: ArrayLike) -> None:
    """Write images uint8 (N, H, W, 3) = ``shape`` from batches (n, H, W, 3) as arr_0, then ``arrays`` by name.

    The write is atomic, and the file is byte for byte that of np.savez. Only one batch is in memory at a time.
    ValueError if the batches do not add up to the shape; OSError, which names the file, if it cannot be written.
    """
    with _writing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            count = 0
            for batch in batches:
                if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                    raise ValueError(f"{path}: a batch of {batch.dtype} {batch.shape} among images of {shape}")
                member.write(np.ascontiguousarray(batch).data)
                count += len(batch)
            if count != shape[0]:
                raise ValueError(f"{path}: got {count} images, expected {shape[0]}")
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, np.asarray(array), allow_pickle=False)


def make_grid(images: Uint8Array, columns: int | None = None, gap: int = GAP) -> Uint8Array:
    """Arrange images (N, H, W, 3) row by row on white: uint8 (rows, columns, 3), by default a square grid."""
    count, height, width, _ = images.shape
    columns = columns or _square(count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def columns_by_class(labels: NDArray[np.int64]) -> int | None:
    """The number of columns, near square, in which images with ``labels`` (N,) have one class per column.

    None if their classes do not take turns, or are too many.
    """
    classes = len(np.unique(labels))
    if not 1 < classes <= MOST_COLUMNS or not np.array_equal(labels[classes:], labels[:-classes]):
        return None
    return classes * max(1, round(math.sqrt(len(labels)) / classes))


def save_grid(path: Path, images: Uint8Array, columns: int | None = None, names: Sequence[str] | None = None) -> None:
    """Save make_grid as a PNG, small images enlarged by an integer factor, with each image's name.

    If every column has a single name, the names are above the columns; else each name is below its image.
    """
    columns = columns or _square(len(images))
    height, width = images.shape[1:3]
    rows = math.ceil(len(images) / columns)
    factor = _factor(max(rows * (height + GAP), columns * (width + GAP)) + GAP, min(height, width))
    if names is None:
        save_png(path, _enlarged(make_grid(images, columns), factor))
        return
    text = _Text(factor * width)
    written = {name: text.wrapped(name) for name in set(names)}
    band = math.ceil(text.height(max(map(len, written.values()), default=1)) / factor)
    if shared := all(name == names[i % columns] for i, name in enumerate(names)):
        grid = np.pad(make_grid(images, columns), ((band, 0), (0, 0), (0, 0)), constant_values=255)
    else:
        grid = make_grid(np.pad(images, ((0, 0), (0, band), (0, 0), (0, 0)), constant_values=255), columns)
    picture = Image.fromarray(_enlarged(grid, factor))
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names[:columns] if shared else names):
        row, column = divmod(i, columns)
        top = 0 if shared else GAP + row * (height + band + GAP) + height
        text.draw(draw, written[name], factor * (GAP + column * (width + GAP)), factor * top)
    _save(path, picture, "PNG")


class _Text:
    """Lines of small text, at most ``width`` pixels wide, in Pillow's built-in font."""

    def __init__(self, width: int) -> None:
        self._width = width
        size = min(max(width // 9, 11), 16)
        # Without FreeType the font has a single size.
        self._font = ImageFont.load_default(size) if features.check("freetype2") else ImageFont.load_default()
        self._line = math.ceil(self._font.getbbox("gjpqy")[3])

    def height(self, lines: int) -> int:
        """The pixels that so many lines take."""
        return max(lines, 1) * self._line + 2

    def wrapped(self, name: str) -> list[str]:
        """The name in lines, broken after spaces, hyphens and underscores where it can be; shortened if too long."""
        lines: list[str] = []
        rest = _ascii(name).strip()
        while rest and len(lines) < MOST_LINES - 1 and self._length(rest) > self._width:
            fits = max(1, self._fitting(rest))
            broken = max(rest.rfind(mark, 0, fits + (mark == " ")) for mark in " -_") + 1
            lines.append(rest[: broken or fits].rstrip())
            rest = rest[broken or fits :].lstrip()
        if self._length(rest) > self._width:
            rest = rest[: self._fitting(rest, "...")].rstrip() + "..."
        return [*lines, rest]

    def draw(self, draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int) -> None:
        """Draw the lines, each centred in the pixels that start at ``left``."""
        for i, text in enumerate(lines):
            place = (left + (self._width - self._length(text)) // 2, top + i * self._line)
            draw.text(place, text, fill=(0, 0, 0), font=self._font)

    def _fitting(self, text: str, end: str = "") -> int:
        """The number of letters that fit, followed by ``end``."""
        return bisect_right(range(1, self._width), self._width, key=lambda n: self._length(text[:n] + end))

    def _length(self, text: str) -> int:
        return math.ceil(self._font.getlength(text))


def _ascii(name: str) -> str:
    """A name in the font's letters: accents are removed, and other characters become question marks."""
    letters = unicodedata.normalize("NFKD", printable(name))
    return "".join(c for c in letters if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def save_pngs(folder: Path, images: Uint8Array, names: Sequence[str]) -> None:
    """Save each image as folder/name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        save_png(folder / f"{name}.png", image)


def save_png(path: Path, image: Uint8Array) -> None:
    """Save one image (H, W, 3) as a PNG file, atomically."""
    _save(path, Image.fromarray(image), "PNG")


def save_trajectories(path: Path, frames: Uint8Array) -> None:
    """Save the steps of images from noise, frames (N, F, H, W, 3): as an animation (.gif), or a row each (.png)."""
    if path.suffix not in (".gif", ".png"):
        raise ValueError(f"trajectory {path} must end in .gif, for an animation, or in .png, for a strip")
    if path.suffix == ".gif":
        save_gif(path, frames[0] if len(frames) == 1 else np.stack([make_grid(step) for step in frames.swapaxes(0, 1)]))
    else:
        save_grid(path, frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1])


def save_gif(path: Path, frames: Uint8Array, seconds: float = 3.0) -> None:
    """Save frames (F, H, W, 3) as a GIF that runs for ``seconds``, rests on the last frame and repeats.

    If more frames are given than fit into that time, it shows evenly spread ones, including the first and the last.
    """
    shown = np.linspace(0, len(frames) - 1, min(len(frames), round(seconds / FRAME))).round().astype(int)
    factor = _factor(max(frames.shape[1:3]), min(frames.shape[1:3]))
    pictures = []
    for frame in frames[shown]:
        picture = Image.fromarray(frame).quantize()  # one palette per frame: noise and image share no colours
        pictures.append(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST))
    each = round(100 * seconds / len(pictures)) * 10  # milliseconds; the format counts hundredths of a second
    durations = [each] * (len(pictures) - 1) + [each + round(1000 * HELD)]
    _save(path, pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _square(count: int) -> int:
    """The number of columns of a square grid."""
    return math.ceil(math.sqrt(count))


def _factor(side: int, cell: int) -> int:
    """The factor that enlarges a picture of ``side`` pixels, each of whose images has ``cell`` pixels."""
    return max(1, math.ceil(CELL / cell), min(4, 800 // side))


def _enlarged(image: Uint8Array, factor: int) -> Uint8Array:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _save(path: Path, picture: Image.Image, kind: str, **options: Any) -> None:
    with _writing(path) as temporary:
        picture.save(temporary, format=kind, **options)


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Like ``replacing``, with an OSError that names the file that cannot be written."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
