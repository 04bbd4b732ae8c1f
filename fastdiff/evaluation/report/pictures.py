"""Pictures in the page: previews and samples, encoded so that they fit into their share of its size."""

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdiff.data import read_samples
from fastdiff.runtime.words import first_line

PREVIEWS = 24
"""Previews of an average of the weights that are shown at most."""

SAMPLES = 64
"""Images of a file of samples that are shown at most."""

SETS = 6
"""Files of samples of a run that are shown at most, the newest ones."""

_MOST_PIXELS = 2**26
_NAME = re.compile(r"(?P<step>\d{6,15})_(?P<average>raw|ema_(?P<rate>[0-9.e-]{1,20}))\.png")
_LEVELS: tuple[tuple[int | None, int | None], ...] = ((None, None), (92, None), (85, 1024), (80, 640), (70, 320))
"""Ways to encode, from the best to the smallest: quality of a JPEG, None for a lossless PNG, and largest side."""


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with the pixels of the file that it was; ``lossy`` if it is not that file's pixels."""

    uri: str
    width: int
    height: int
    lossy: bool


@dataclass(frozen=True)
class Strip:
    """The previews of an average over the steps: ``found`` are the files, ``unreadable`` those left out.

    ``rate`` is the average's, 0 for the raw weights.
    """

    rate: float
    shown: dict[int, Picture]
    found: int
    unreadable: int


@dataclass(frozen=True)
class SampleSet:
    """The first images of a file of samples, with the names of their classes, () if it has none, or ``problem``."""

    name: str
    shown: tuple[Picture, ...] = ()
    classes: tuple[str, ...] = ()
    count: int = 0
    problem: str = ""


def find_previews(folder: Path) -> dict[float, dict[int, Path]]:
    """The preview files of a run folder by the average's rate, 0 for the raw weights, and step; the highest rate first.

    OSError if the folder cannot be read.
    """
    found: dict[float, dict[int, Path]] = {}
    previews = folder / "previews"
    for path in previews.iterdir() if previews.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) is not None:
            try:
                rate = float(match["rate"] or 0)
            except ValueError:
                continue
            found.setdefault(rate, {})[int(match["step"])] = path
    return {rate: dict(sorted(found[rate].items())) for rate in sorted(found, reverse=True)}


def read_strip(rate: float, paths: dict[int, Path], budget: int) -> Strip:
    """Read the previews of an average, evenly spread over the steps, in at most ``budget`` bytes of the page."""
    unreadable: set[int] = set()

    def load(step: int) -> Image.Image | None:
        try:
            return _reduced(_opened(paths[step]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises on damaged files
            unreadable.add(step)
            return None

    shown = _fitting(load, list(paths), _spread, PREVIEWS, budget)
    return Strip(rate, shown, len(paths), len(unreadable))


def find_samples(folder: Path) -> list[Path]:
    """The files of samples of a run, the newest first."""
    found: list[tuple[int, str, Path]] = []
    for place in (folder / "evaluation", folder):
        for path in place.glob("*.npz"):
            with suppress(OSError):  # deleted meanwhile
                found.append((path.stat().st_mtime_ns, path.name, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def read_set(path: Path, class_names: Sequence[str], budget: int) -> SampleSet:
    """Read the first images of a file of samples, in at most ``budget`` bytes of the page."""
    try:
        samples = read_samples(path)
        known = samples.class_names or class_names
        shown = _fitting(lambda i: _from(samples.images[i]), range(len(samples.images)), _first, SAMPLES, budget)
        classes: tuple[str, ...] = ()
        if samples.labels is not None:
            numbers = samples.labels[list(shown)].tolist()
            classes = tuple(known[n] if 0 <= n < len(known) else f"class {n}" for n in numbers)
        return SampleSet(path.name, tuple(shown.values()), classes, len(samples.images))
    except ValueError as error:
        return SampleSet(path.name, problem=first_line(error, 200).replace(str(path), path.name))
    except OSError as error:
        return SampleSet(path.name, problem=f"it cannot be read ({error.strerror})")


def _from(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))


def _opened(path: Path) -> Image.Image:
    # Pillow warns about large images, which are refused here.
    with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG"]) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{path} has too many pixels")
        return image.convert("RGB")


def _reduced(image: Image.Image) -> Image.Image:
    """The image without the enlargement of a preview grid, which repeats every pixel."""
    pixels = np.asarray(image)
    for factor in range(8, 1, -1):
        if pixels.shape[0] % factor == 0 and pixels.shape[1] % factor == 0:
            small = pixels[::factor, ::factor]
            if np.array_equal(small.repeat(factor, 0).repeat(factor, 1), pixels):
                return _from(small)
    return image


def _fitting(
    load: Callable[[int], Image.Image | None],
    keys: Sequence[int],
    choose: Callable[[Sequence[int], int], Sequence[int]],
    most: int,
    budget: int,
) -> dict[int, Picture]:
    """Encode the pictures of ``most`` chosen keys in the best way in which they fit; of fewer if none does.

    ``load`` gives a picture, or None if it is unreadable. One picture is in memory at a time.
    """
    count, level = min(most, len(keys)), 0
    while count:
        alone = count == 1 and level == len(_LEVELS) - 1
        if (found := _encoded(load, choose(keys, count), level, 2**62 if alone else budget)) is not None:
            return found
        if level < len(_LEVELS) - 1:
            level += 1
        else:
            count = -(-count // 2)
    return {}


def _first(keys: Sequence[int], count: int) -> Sequence[int]:
    return keys[:count]


def _spread(keys: Sequence[int], count: int) -> Sequence[int]:
    """``count`` of the keys, evenly spread, with the first and the last; the last alone if it is one."""
    if count == 1:
        return [keys[-1]]
    return [keys[round(i * (len(keys) - 1) / (count - 1))] for i in range(count)]


def _encoded(
    load: Callable[[int], Image.Image | None], keys: Sequence[int], level: int, budget: int
) -> dict[int, Picture] | None:
    """The pictures at a level of _LEVELS; None if they do not fit."""
    found: dict[int, Picture] = {}
    used = 0
    for key in keys:
        if (image := load(key)) is None:
            continue
        found[key] = _encode(image, *_LEVELS[level])
        used += len(found[key].uri)
        if used > budget:
            return None
    return found


def _encode(image: Image.Image, quality: int | None, side: int | None) -> Picture:
    width, height = image.size
    if side is not None and max(width, height) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if quality is None:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0 if quality > 90 else 2, optimize=True)
    kind = "png" if quality is None else "jpeg"
    coded = base64.b64encode(file.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{coded}", width, height, quality is not None)
