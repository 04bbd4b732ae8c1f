"""The small images that a super-resolution model enlarges: an npz of samples, or a folder or zip of any images."""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdiff.data import ImageFolder, read_samples
from fastdiff.data.cache import decode
from fastdiff.data.classes import class_of_file, completed, composed, renumbered
from fastdiff.data.threads import Progress
from fastdiff.data.zipped import ZipMember
from fastdiff.runtime.words import printable

_NAMED = 5  # files that an error names


@dataclass(frozen=True, eq=False)
class BaseSamples:
    """N images uint8 (N, h, w, 3) or a folder of N, with labels int64 (N,) or None; sample i is from image i mod N."""

    images: NDArray[np.uint8] | ImageFolder
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images of the samples ``numbers`` (n,): uint8 (n, h, w, 3). Only these are read.

        Raises UnreadableImage if a file of a folder is not an image.
        """
        rows = numbers % len(self)
        if not isinstance(self.images, ImageFolder):
            return self.images[rows]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata and the like
            return np.stack([self.images[row][0] for row in rows])

    def check(self, numbers: NDArray[np.int64], on_progress: Progress | None = None) -> None:
        """Read the images of the samples ``numbers`` (n,), so that a bad one is known before the first is enlarged.

        ``on_progress(done, total)`` is called after each. Raises ValueError, which names those that cannot be read.
        """
        if not isinstance(self.images, ImageFolder):
            return
        asked = self.images.only(np.unique(numbers % len(self)).tolist())
        if unreadable := decode(asked, lambda *_: None, on_progress).unreadable:
            named = [f"{printable(name)} ({reason})" for name, reason in list(unreadable.items())[:_NAMED]]
            more = f" and {len(unreadable) - _NAMED:,} more" if len(unreadable) > _NAMED else ""
            raise ValueError(
                f"base_samples {self.images.root}: {len(unreadable):,} of {len(asked):,} images cannot be read: "
                f"{', '.join(named)}{more}; repair or remove them, or leave them out with --skip-unreadable"
            )

    def described(self) -> list[str]:
        """The name and length in bytes of each image's file, in order; empty for an npz."""
        if not isinstance(self.images, ImageFolder):
            return []
        return [f"{n} {_length(file)}" for n, file in zip(self.images.names, self.images.files, strict=True)]

    def labels_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """The classes of the samples ``numbers`` (n,): int64 (n,), or None without labels."""
        return None if self.labels is None else self.labels[numbers % len(self)]


def _length(file: Path | ZipMember) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.info.file_size


def _holds_files(path: Path) -> bool:
    """Whether base samples are image files, in a folder or a zip, and not an npz."""
    return path.is_dir() or (path.suffix.lower() == ".zip" and path.is_file())


def unreadable_in(path: Path | None, on_progress: Progress | None = None) -> dict[str, str]:
    """The images of a folder or zip of base samples that cannot be read, with the reason. An npz has none.

    ``on_progress(done, total)`` is called after each image. Raises ValueError if there is no image that can be read.
    """
    if path is None or not _holds_files(path := path.expanduser()):
        return {}
    return decode(ImageFolder(path, 1, labels=None), lambda *_: None, on_progress).unreadable


def load_base_samples(
    path: Path,
    small_size: int,
    class_names: tuple[str, ...] | None,
    num_classes: int | None = None,
    skipped: Mapping[str, str] | None = None,
) -> BaseSamples:
    """Load base samples from an npz (arr_0, arr_1) of small_size, or from a folder or zip of images, which are resized.

    ``skipped`` are images of the folder that are left out.

    For a class-conditional model ``class_names`` names its ``num_classes`` classes (by default one per name); () means
    that they have no names. The samples then have labels. In an npz they are arr_1, whose class_names are matched with
    the model's. In a folder the label of an image is its first sub-folder if that has the name of a class, else the
    class that its file name starts with, up to an underscore. For other models ``class_names`` is None, and so are the
    labels.

    Raises ValueError for images of another size, missing labels or unknown classes, and whatever read_samples and
    ImageFolder raise. Warns if classes are matched by number.
    """
    path = path.expanduser()
    if _holds_files(path):
        folder = ImageFolder(path, small_size, labels=None)
        if skipped:
            folder = folder.only([i for i, name in enumerate(folder.names) if name not in skipped])
        labels = None if class_names is None else _labels_in(folder, completed(class_names, num_classes or 0))
        return BaseSamples(folder, labels)
    samples = read_samples(path)
    height, width = samples.images.shape[1:3]
    if (height, width) != (small_size, small_size):
        raise ValueError(
            f"{path} holds images of {width}x{height} pixels, and the model enlarges {small_size}x{small_size}: "
            "give images of that size, or a folder of images, which are resized"
        )
    if class_names is None:
        return BaseSamples(samples.images, None)
    if samples.labels is None:
        raise ValueError(f"{path} has no labels, which this model needs: save them with np.savez(file, images, labels)")
    remedy = "give samples of the classes that it was trained on"
    count = len(class_names) if num_classes is None else num_classes
    labels = renumbered(samples.labels, samples.class_names, class_names, count, path, remedy, npz=True)
    return BaseSamples(samples.images, labels)


def _labels_in(folder: ImageFolder, class_names: tuple[str, ...]) -> NDArray[np.int64]:
    """The classes of a folder's images, int64 (N,), by the names of sub-folders and files."""
    if not class_names:
        raise ValueError(
            f"{folder.root} is a folder, but the model's classes have no names to match with its files: "
            "give an npz with labels"
        )
    numbers = {name: i for i, name in enumerate(class_names)}
    return np.array([_class_of(name, folder, numbers, class_names) for name in folder.names], np.int64)


def _class_of(name: str, folder: ImageFolder, numbers: dict[str, int], class_names: tuple[str, ...]) -> int:
    *parents, file = name.split("/")
    words = file.split("_")
    # Percent-encoded names, as fastdiff writes them, are decoded. Otherwise the longest prefix that is a class counts;
    # it may contain underscores.
    coded = [class_of_file(file)] if class_of_file(file) != words[0] else []
    beginnings = ["_".join(words[:end]) for end in range(len(words), 0, -1)]
    for candidate in map(composed, [*parents[:1], *coded, *beginnings]):
        if candidate in numbers:
            return numbers[candidate]
    said = [*parents[:1], words[0]]
    near = [match for text in said for match in difflib.get_close_matches(text, class_names, n=3, cutoff=0.4)]
    known = list(dict.fromkeys(near)) or class_names[:10]
    raise ValueError(
        f"{printable(name)} in {folder.root} matches no class of the model, neither by file name nor by folder: "
        f"rename it; there are {printable(', '.join(known))}{' and more' if len(class_names) > len(known) else ''}"
    )
