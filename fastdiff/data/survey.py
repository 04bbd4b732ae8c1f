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

from fastdiff.config import DataConfig, Labels
from fastdiff.data.cache import decode
from fastdiff.data.dataset import ImageFolder, LeftOut, Preflight, extension_counts
from fastdiff.data.loading import doubts_of_classes, load_dataset
from fastdiff.data.npz import read_samples
from fastdiff.data.threads import Progress
from fastdiff.runtime.words import printable

SHOWN = 100
"""Maximum number of images on a contact sheet."""

FEW = 10
"""Classes with fewer images are reported."""


@dataclass(frozen=True)
class Survey:
    """The contents of a data set at one image_size.

    ``unreadable`` lists the images that cannot be decoded. ``class_counts`` counts the others, and ``shown``
    (n, H, W, 3) holds up to 100 of them, evenly spaced, as a model sees them, with their classes as ``captions``.
    ``doubts`` are warnings about training on the set, as phrases that follow "has".
    """

    preflight: Preflight
    image_size: int
    unreadable: tuple[LeftOut, ...]
    class_counts: dict[str, int]
    shown: NDArray[np.uint8]
    captions: tuple[str, ...]
    doubts: tuple[str, ...]


def survey(
    path: Path, image_size: int | None = None, labels: Labels = Labels.PREFIX, on_progress: Progress | None = None
) -> Survey:
    """Inspect every image of a folder, a zip or an npz, keeping only a few of them in memory.

    ``image_size`` defaults to 64, or to the size of an npz. ``on_progress(done, total)`` is called after each image.
    Raises ValueError, like load_dataset, if the set cannot be trained on.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix.lower() == ".npz" and path.is_file():
        return _of_samples(path, image_size, on_progress)
    folder = ImageFolder(path, image_size or 64, labels)
    look = _Look(len(folder))
    enlarged = 0

    def keep(i: int, image: NDArray[np.uint8], size: tuple[int, int]) -> None:
        nonlocal enlarged
        enlarged += min(size) < folder.image_size
        look.at(i, image)

    decoded = decode(folder, keep, on_progress)
    assert folder.labels is not None
    readable = [name not in decoded.unreadable for name in folder.names]
    kinds = extension_counts(list(compress(folder.names, readable)))
    preflight = Preflight(kinds, folder.class_names, decoded.smallest, decoded.largest, tuple(folder.left_out))
    unreadable = tuple(LeftOut(name, reason) for name, reason in decoded.unreadable.items())
    classes = [folder.class_names[label] for label in folder.labels]
    counts = dict.fromkeys(folder.class_names, 0) | Counter(compress(classes, readable))
    doubts = []
    if enlarged:
        doubts.append(f"{_count(enlarged)} smaller than {folder.image_size} pixels, which will be enlarged and blurred")
    return look.survey(preflight, folder.image_size, unreadable, counts, classes, doubts)


def _of_samples(path: Path, image_size: int | None, on_progress: Progress | None) -> Survey:
    samples = read_samples(path)
    image_size = image_size or samples.images.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the classes, which the survey reports itself
        data = load_dataset(DataConfig(data_dir=str(path)), image_size, labelled=samples.labels is not None)
    look = _Look(len(data.images))
    for i, image in enumerate(data.images):
        look.at(i, image)
        if on_progress is not None:
            on_progress(i + 1, len(data.images))
    classes = [] if data.labels is None else [data.class_names[label] for label in data.labels]
    counts = dict.fromkeys(data.class_names, 0) | Counter(classes)
    return look.survey(data.preflight, image_size, (), counts, classes or list(data.names), [])


class _Look:
    """Accumulates what the survey needs, one image at a time."""

    def __init__(self, total: int) -> None:
        self._wanted = set(np.linspace(0, total - 1, min(total, SHOWN)).round().astype(int).tolist())
        self._shown: dict[int, NDArray[np.uint8]] = {}
        self._seen: set[bytes] = set()
        self._count = 0

    def at(self, i: int, image: NDArray[np.uint8]) -> None:
        self._count += 1
        self._seen.add(blake2b(image.tobytes(), digest_size=16).digest())
        if i in self._wanted:
            self._shown[i] = np.array(image)

    def survey(
        self,
        preflight: Preflight,
        image_size: int,
        unreadable: tuple[LeftOut, ...],
        counts: dict[str, int],
        captions: Sequence[str],
        doubts: list[str],
    ) -> Survey:
        if alike := self._count - len(self._seen):
            doubts.append(f"{_count(alike)} with the same pixels as another, at {image_size}x{image_size}")
        if of_classes := doubts_of_classes(tuple(counts), self._count):
            doubts += of_classes
        elif few := [name for name, count in counts.items() if count < FEW]:
            doubts.append(
                f"{len(few):,} of {len(counts):,} classes with fewer than {FEW} images: {printable(', '.join(few[:5]))}"
            )
        shown = np.array([*self._shown.values()], np.uint8).reshape(-1, image_size, image_size, 3)
        return Survey(
            preflight, image_size, unreadable, counts, shown, tuple(captions[i] for i in self._shown), tuple(doubts)
        )


def _count(images: int) -> str:
    return f"{images:,} {'image' if images == 1 else 'images'}"
