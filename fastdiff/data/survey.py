"""Inspect a data set before training on it."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import DataConfig
from fastdiff.data.cache import decode
from fastdiff.data.dataset import LeftOut, Preflight, extension_counts
from fastdiff.data.loading import doubts_of_classes, doubts_of_pixels, doubts_of_values, folder_of, is_npz, load_dataset
from fastdiff.data.npz import read_samples
from fastdiff.data.threads import Progress
from fastdiff.runtime.words import printable

SHOWN = 100
"""Maximum number of images on a contact sheet."""

FEW = 10
"""Classes with fewer images are reported."""

_NAMED = 5  # images of a kind that a warning names


@dataclass(frozen=True)
class Survey:
    """The contents of a data set at one image_size.

    ``unreadable`` lists the images that cannot be decoded. ``class_counts`` counts the others, and ``shown``
    (n, H, W, 3) holds up to 100 of them, evenly spaced, as a model sees them, with their classes as ``captions``.
    ``doubts`` are warnings about training on the set, as phrases that follow "has"; ``notes`` are lines about where the
    classes come from.
    """

    preflight: Preflight
    image_size: int
    unreadable: tuple[LeftOut, ...]
    class_counts: dict[str, int]
    shown: NDArray[np.uint8]
    captions: tuple[str, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...] = ()


def survey(config: DataConfig, image_size: int | None = None, on_progress: Progress | None = None) -> Survey:
    """Inspect every image of config.data_dir, a folder, a zip or an npz, keeping only a few of them in memory.

    ``image_size`` defaults to 64, or to the size of an npz. ``on_progress(done, total)`` is called after each image.
    Raises ValueError, like load_dataset, if the set cannot be trained on.
    """
    path = Path(os.path.expanduser(config.data_dir))
    if is_npz(path):
        return _of_samples(path, image_size, on_progress)
    folder = folder_of(config, image_size or 64)
    look = _Look(folder.image_size, folder.names)
    enlarged: list[str] = []

    def keep(i: int, image: NDArray[np.uint8], size: tuple[int, int]) -> None:
        if min(size) < folder.image_size:
            enlarged.append(folder.names[i])
        look.at(i, image)

    decoded = decode(folder, keep, on_progress)
    assert folder.labels is not None
    readable = [name not in decoded.unreadable for name in folder.names]
    kinds = extension_counts(list(compress(folder.names, readable)))
    preflight = Preflight(kinds, folder.class_names, decoded.smallest, decoded.largest, tuple(folder.left_out))
    unreadable = tuple(LeftOut(name, reason) for name, reason in decoded.unreadable.items())
    classes = [folder.class_names[label] for label in folder.labels]
    counts = dict.fromkeys(folder.class_names, 0) | Counter(compress(classes, readable))
    doubts = doubts_of_values(decoded, config.window)
    if enlarged:
        doubts.append(
            f"{_count(len(enlarged))} smaller than {folder.image_size} pixels, which will be enlarged and blurred: "
            f"{_named(enlarged)}"
        )
    return look.survey(preflight, unreadable, counts, classes, doubts, folder.notes)


def _of_samples(path: Path, image_size: int | None, on_progress: Progress | None) -> Survey:
    samples = read_samples(path)
    image_size = image_size or samples.images.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the classes, which the survey reports itself
        data = load_dataset(DataConfig(data_dir=str(path)), image_size, labelled=samples.labels is not None)
    look = _Look(image_size, data.names)
    for i, image in enumerate(data.images):
        look.at(i, image)
        if on_progress is not None:
            on_progress(i + 1, len(data.images))
    classes = [] if data.labels is None else [data.class_names[label] for label in data.labels]
    counts = dict.fromkeys(data.class_names, 0) | Counter(classes)
    return look.survey(data.preflight, (), counts, classes or list(data.names), doubts_of_pixels(data.images))


class _Look:
    """Accumulates what the survey needs, one image at a time."""

    def __init__(self, image_size: int, names: Sequence[str]) -> None:
        self._image_size, self._names = image_size, names
        total = len(names)
        self._wanted = set(np.linspace(0, total - 1, min(total, SHOWN)).round().astype(int).tolist())
        self._shown: dict[int, NDArray[np.uint8]] = {}
        self._first: dict[bytes, int] = {}
        self._repeated: list[tuple[int, int]] = []  # images with the pixels of an earlier one
        self._count = 0

    def at(self, i: int, image: NDArray[np.uint8]) -> None:
        self._count += 1
        first = self._first.setdefault(blake2b(image.tobytes(), digest_size=16).digest(), i)
        if first != i:
            self._repeated.append((i, first))
        if i in self._wanted:
            self._shown[i] = np.array(image)

    def survey(
        self,
        preflight: Preflight,
        unreadable: tuple[LeftOut, ...],
        counts: dict[str, int],
        captions: Sequence[str],
        doubts: list[str],
        notes: tuple[str, ...] = (),
    ) -> Survey:
        size = self._image_size
        if self._repeated:
            pairs = [f"{self._names[i]} is {self._names[first]}" for i, first in self._repeated[:_NAMED]]
            more = len(self._repeated) - len(pairs)
            same = f"{_count(len(self._repeated))} with the same pixels as another, at {size}x{size}"
            doubts.append(f"{same}: {_named(pairs, more)}")
        if of_classes := doubts_of_classes(tuple(counts), self._count):
            doubts += of_classes
        elif few := [name for name, count in counts.items() if count < FEW]:
            doubts.append(f"{len(few):,} of {len(counts):,} classes with fewer than {FEW} images: {_named(few)}")
        shown = np.array([*self._shown.values()], np.uint8).reshape(-1, size, size, 3)
        named = tuple(captions[i] for i in self._shown)
        return Survey(preflight, size, unreadable, counts, shown, named, tuple(doubts), notes)


def _count(images: int) -> str:
    return f"{images:,} {'image' if images == 1 else 'images'}"


def _named(names: Sequence[str], more: int = 0) -> str:
    """The first few names, and how many there are besides; ``more`` are not among them."""
    more += max(len(names) - _NAMED, 0)
    return printable(", ".join(names[:_NAMED])) + (f" and {more:,} more" if more else "")
