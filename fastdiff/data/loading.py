"""Load a training set: a folder or zip of images, which is decoded once, or an npz of images as it is."""

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import READING, DataConfig, ImagesConfig
from fastdiff.config.model import MOST_CLASSES
from fastdiff.data.cache import Decoded, decode_once
from fastdiff.data.dataset import ImageFolder, LeftOut, Preflight, extension_counts
from fastdiff.data.images import DARK, Decoding
from fastdiff.data.labelling import nearly_as_many
from fastdiff.data.npz import Samples, read_samples
from fastdiff.data.threads import Progress
from fastdiff.runtime.display import Lines
from fastdiff.runtime.words import printable

if TYPE_CHECKING:
    from fastdiff.runtime.distributed import World

_DARK = 2 * DARK // 256  # of 255: a bit more than DARK, for values from 0 to 16
_AT_ONCE = 2**24  # values


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images uint8 (N, H, W, 3), in memory or memory-mapped read-only, with labels int64 (N,) or None.

    ``names`` are the names of the N images relative to the data folder. ``fingerprint`` is 64 hex digits, a hash of the
    names and lengths in bytes of the N images, the class of each, and the classes. It is the same for a copy of the
    folder, a zip of it, other file times and another image_size. It ignores files that are left out and does not notice
    other bytes in a file of the same length. For an npz it covers the pixels, too, by their CRC-32. ``named`` is false
    for an npz whose classes have no names: then class_names are their numbers. ``notes`` are lines for the log.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    preflight: Preflight
    names: tuple[str, ...]
    fingerprint: str
    named: bool = True
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise OSError if the mapped file has become shorter: reading past its end kills the process (SIGBUS)."""
        file: Any = self.images.base  # the mapping keeps its file open
        if isinstance(self.images, np.memmap) and isinstance(file, mmap.mmap):
            missing = self.images.offset + self.images.nbytes - file.size()
            if missing > 0:
                own = Path(self.images.filename or "").suffix == ".npz"
                remedy = (
                    "restore it and continue with --resume"
                    if own
                    else "start again with --resume, which decodes them again"
                )
                raise OSError(
                    f"{self.images.filename}, the decoded images, has lost {missing:,} bytes while in use; {remedy}"
                )


def is_npz(path: Path) -> bool:
    """Whether the data at ``path`` are an npz, not a folder or a zip."""
    return path.suffix.lower() == ".npz" and path.is_file()


def load_dataset(
    config: DataConfig,
    image_size: int,
    *,
    labelled: bool,
    reading: int = READING,
    on_progress: Progress | None = None,
    processes: int = 1,
) -> Dataset:
    """Every readable image of config.data_dir at image_size, in the order of the folder, the zip or the npz.

    Unreadable images are left out and named in the preflight. ``reading`` is the version of the rules by which the data
    is read (config.READING). ``on_progress(done, total)`` is called after each decoded image, in the caller's thread.
    If several ``processes`` of this machine load the folder, cache auto uses the file, which they all map, and cache
    memory gives each its copy: let one of them load the folder first, and the others reuse its file.

    An npz (arr_0 and arr_1 as in read_samples) is memory-mapped in place and contains its labels. If it has no
    class_names, the classes are named by their numbers.

    If ``labelled``, warns about classes that teach a model nothing. Raises ValueError if no image of the folder can be
    read, if images are unreadable and config.strict is set, if neither memory nor disk can hold the decoded images, or
    if an npz has another image size, lacks the wanted labels or is refused by read_samples.
    """
    path = Path(os.path.expanduser(config.data_dir))
    if is_npz(path):
        if config.label_file:
            raise ValueError(f"label_file {config.label_file}: {path} holds its own classes; leave it out")
        dataset = _from_samples(path, read_samples(path), config.random_crop, image_size, labelled, reading)
    else:
        dataset = _from_folder(config, image_size, labelled, on_progress, processes, reading)
    if dataset.labels is not None:
        doubts = doubts_of_classes(dataset.class_names, len(dataset.images))
        if not dataset.named:
            doubts.append("no class_names: its classes are called by their numbers")
        for doubt in doubts:
            warnings.warn(f"{path} has {doubt}", stacklevel=2)
    return dataset


def load_shared(
    config: DataConfig, image_size: int, *, labelled: bool, world: "World", display: Lines, reading: int = READING
) -> Dataset:
    """Like load_dataset, on every process: one per machine decodes the images, and the others map its file.

    Raises ValueError, on all processes, if one of them sees other images than the first.
    """
    dataset = world.one_by_machine_first(
        lambda: load_dataset(
            config,
            image_size,
            labelled=labelled,
            reading=reading,
            on_progress=lambda done, total: display.advance("images", done, total),
            processes=world.local_size,
        )
    )
    display.finish("images")
    prints = world.all_gather_object(dataset.fingerprint)
    if (other := next((rank for rank, found in enumerate(prints) if found != prints[0]), None)) is not None:
        world.refuse(
            f"data_dir {config.data_dir}: process {other} sees other images than process 0; every machine needs the "
            "same folder"
        )
    return dataset


def doubts_of_classes(class_names: Sequence[str], images: int) -> list[str]:
    """Warnings about training with these classes, as phrases that follow "has"."""
    if images > 1 and len(class_names) == 1:
        return [f"one class ({printable(class_names[0])}): class labels teach the model nothing"]
    if nearly_as_many(len(class_names), images):
        return [
            f"{len(class_names):,} classes in {images:,} images, nearly one class per image: to train by class, start "
            "the file names with the class and an underscore, use sub-folders and --labels folder, or name a CSV or "
            "JSON file with --label-file"
        ]
    return []


def doubts_of_values(decoded: Decoded, window: tuple[float, float] | None) -> list[str]:
    """A warning about 16-bit images that are nearly black, as a phrase that follows "has"."""
    if window is not None or not decoded.dark:
        return []
    white = max(2 ** decoded.peak.bit_length() - 1, 255)
    return [
        f"{decoded.dark:,} of {decoded.deep:,} 16-bit images without a value above {decoded.peak:,}, which are nearly "
        f"black: --window 0,{white} makes {white:,} white in grey ones, and colour needs converting to 8 bits"
    ]


def doubts_of_pixels(images: NDArray[np.uint8]) -> list[str]:
    """A warning about images (N, H, W, 3) of an npz that are all nearly black, as a phrase that follows "has"."""
    peak, step = 0, max(1, _AT_ONCE // images[0].size)
    for at in range(0, len(images), step):  # of most data the first part decides
        peak = max(peak, int(images[at : at + step].max()))
        if peak > _DARK:
            return []
    scaled = f": multiply the values by {255 / peak:.3g}, which makes {peak} white, and save it again" if peak else ""
    return [f"no value above {peak} of 255 in any image, which are nearly black{scaled}"]


def folder_of(config: ImagesConfig, image_size: int, labelled: bool = True, reading: int = READING) -> ImageFolder:
    """The images of a folder or zip, read as ``config`` says. Raises ImageFolder's ValueErrors."""
    decoding = Decoding(config.max_pixels, config.window, reading)
    return ImageFolder(config.data_dir, image_size, config.labels if labelled else None, config.label_file, decoding)


def _from_folder(
    config: DataConfig, image_size: int, labelled: bool, on_progress: Progress | None, processes: int, reading: int
) -> Dataset:
    folder = folder_of(config, image_size, labelled, reading)
    images, decoded, lengths = decode_once(folder, config, on_progress, processes)
    if decoded.unreadable and config.strict:
        name, reason = next(iter(decoded.unreadable.items()))
        raise ValueError(
            f"strict: {len(decoded.unreadable):,} of {len(folder):,} images in {folder.root} cannot be read, the first "
            f"is {printable(name)} ({reason}); repair or remove them, or leave strict off to skip them"
        )
    readable = np.array([name not in decoded.unreadable for name in folder.names])
    names = tuple(compress(folder.names, readable))
    unreadable = [LeftOut(name, reason) for name, reason in decoded.unreadable.items()]
    preflight = Preflight(
        extension_counts(names),
        folder.class_names,
        decoded.smallest,
        decoded.largest,
        (*unreadable, *folder.left_out),
    )
    labels = None if folder.labels is None else folder.labels[readable]
    for doubt in doubts_of_values(decoded, config.window):
        warnings.warn(f"{folder.root} has {doubt}", stacklevel=3)
    fingerprint = _fingerprint(names, lengths[readable], labels, folder.written_class_names, config.window)
    return Dataset(images, labels, folder.class_names, preflight, names, fingerprint, notes=folder.notes)


def _from_samples(path: Path, samples: Samples, crop: float, image_size: int, labelled: bool, reading: int) -> Dataset:
    height, width = samples.images.shape[1:3]
    if (height, width) != (image_size, image_size):
        other = f", or train with --image-size {height}" if height == width else ""
        if crop < 1:
            other = f", from which --random-crop {crop:g} cuts the model's, or leave that out"
        raise ValueError(
            f"{path} holds images of {width}x{height} pixels, not {image_size}x{image_size}: pack the images again "
            f"with --image-size {image_size}{other}"
        )
    for doubt in doubts_of_pixels(samples.images):
        warnings.warn(f"{path} has {doubt}", stacklevel=3)
    count = len(samples.images)
    labels = samples.labels if labelled else None
    if labelled and labels is None:
        raise ValueError(
            f"{path} has no labels (arr_1), which --class-cond and classifiers need: save them with "
            "np.savez(file, images, labels), or pack images with classes"
        )
    named = labels is None or samples.class_names is not None
    known = samples.class_names
    if labels is not None and known is None and reading > 1 and _from_one(labels):
        labels, known = labels - 1, tuple(map(str, range(1, labels.max() + 1)))
    class_names = () if labels is None else _class_names(path, labels, known)
    names = samples.names or tuple(f"{i:0{len(str(count - 1))}}" for i in range(count))
    preflight = Preflight({"npz": count}, class_names, (width, height), (width, height), ())
    about = [samples.images.shape, samples.checksum, names, class_names]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(b"" if labels is None else labels.tobytes())
    # otherwise np.take would copy the images for every batch
    images = samples.images if samples.images.flags.c_contiguous else np.ascontiguousarray(samples.images)
    return Dataset(images, labels, class_names, preflight, names, digest.hexdigest(), named)


def _from_one(labels: NDArray[np.int64]) -> bool:
    """Whether the classes are numbered from 1: there are several, and every number is used."""
    return labels.min() == 1 and 1 < labels.max() == len(np.unique(labels))


def _class_names(path: Path, labels: NDArray[np.int64], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the classes, or their numbers if they have no names; ValueError for labels out of range."""
    known = MOST_CLASSES if names is None else len(names)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= known:
        raise ValueError(
            f"{path} has labels from {least} to {most}, which must be from 0 to {known - 1}: number the classes from 0"
        )
    return names or tuple(str(i) for i in range(most + 1))


def _fingerprint(
    names: Sequence[str],
    lengths: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    window: tuple[float, float] | None,
) -> str:
    digest = hashlib.sha256(json.dumps(class_names).encode())
    if window is not None:
        digest.update(f"{window}\n".encode())
    classes = repeat(None) if labels is None else labels.tolist()
    for name, length, label in zip(names, lengths.tolist(), classes, strict=False):
        digest.update(os.fsencode(name) + f"\0{length} {label}\n".encode())
    return digest.hexdigest()
