"""Pack a folder of images into one file to train from."""

import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastdiff.config import DataConfig
from fastdiff.data.archives import ArchiveError, safe_name
from fastdiff.data.dataset import ImageFolder
from fastdiff.data.label_files import STANDARD
from fastdiff.data.loading import Dataset, is_npz, load_dataset
from fastdiff.data.npz import read_samples
from fastdiff.data.threads import Progress
from fastdiff.runtime.files import whole
from fastdiff.runtime.words import printable


def pack_zip(source: Path, out: Path, on_progress: Progress | None = None) -> int:
    """Store the image files of a folder, unchanged and in order, in an uncompressed zip; returns their number.

    A folder and its zip are the same data set, with the same fingerprint, at any size and with any kind of labels:
    label files with the names that other projects give them are stored, too. ``on_progress(done, total)`` is called
    after each file. Raises ValueError like ImageFolder, for an npz, for a name that a zip cannot hold, and if ``out``
    exists.
    """
    if is_npz(source.expanduser()):
        raise ValueError(f"{source} holds pixels, no image files: train on it as it is, or pack it as an .npz")
    folder = ImageFolder(source, 1, labels=None)
    standard = {name: file for name, file in folder.label_files.items() if os.path.basename(name) in STANDARD}
    files = [*zip(folder.names, folder.files, strict=True), *standard.items()]
    with whole(out) as file, zipfile.ZipFile(file, "w") as archive:
        for done, (name, image) in enumerate(files, start=1):
            try:
                safe_name(out, name)
            except ArchiveError:
                what = "a backslash in its name" if "\\" in name else "a name that leads out of a zip"
                raise ValueError(f"{printable(name)} in {source} has {what}: rename it") from None
            info = zipfile.ZipInfo(name)  # without a time, so that equal folders make equal files
            info.external_attr = 0o644 << 16
            try:
                with image.open("rb") as content, archive.open(info, "w", force_zip64=True) as member:
                    shutil.copyfileobj(content, member, 2**20)
            except UnicodeEncodeError:
                raise ValueError(f"{printable(name)} in {source} is not in UTF-8: rename it") from None
            if on_progress is not None:
                on_progress(done, len(files))
    return len(folder)


def pack_npz(config: DataConfig, out: Path, image_size: int, on_progress: Progress | None = None) -> Dataset:
    """Save the decoded images of config.data_dir with np.savez, to be memory-mapped; returns the data set.

    arr_0: uint8 (N, H, W, 3); arr_1: int64 (N,), the classes; class_names and names: text. An npz without classes gives
    one without arr_1 and class_names. If the images do not fit in memory, they go through a memory-mapped file beside
    ``out``. Raises ValueError like load_dataset, and if ``out`` exists.
    """
    with whole(out) as file:
        beside = replace(config, cache_dir=str(file.parent / "cache"))
        path = Path(config.data_dir).expanduser()
        labelled = not is_npz(path) or read_samples(path).labels is not None
        data = load_dataset(beside, image_size, labelled=labelled, on_progress=on_progress)
        names = np.array(data.names, np.str_)
        with file.open("xb") as target:
            if data.labels is None:
                np.savez(target, data.images, names=names)
            else:
                np.savez(target, data.images, data.labels, class_names=np.array(data.class_names, np.str_), names=names)
    return data
