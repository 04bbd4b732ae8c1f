"""Read samples from an npz file, as improved-diffusion and fastdiff write them, memory-mapped in place.

Such a file is untrusted: its claims alone never allocate memory.
"""

import io
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastdiff.data.archives import DEFLATE_RATIO, missing_files
from fastdiff.data.arrays import (
    IMAGES,
    LABELS,
    WANTED,
    UnfitError,
    as_images,
    as_labels,
    may_be_images,
    may_be_labels,
)
from fastdiff.data.cache import available_memory
from fastdiff.data.classes import composed
from fastdiff.runtime.words import first_line, printable

_CHUNK = 2**20  # bytes per read; the directory of an npz takes a few hundred
_HEADER = 2**14  # bytes: more than NumPy accepts as an array's header
_KEYS = (
    *(("arr_0", "arr_1"), ("images", "labels"), ("image", "label"), ("x_train", "y_train"), ("X_train", "y_train")),
    *(("train_images", "train_labels"), ("x", "y"), ("X", "y")),
)
"""Names of images and their labels: NumPy's and fastdiff's, Keras' and MedMNIST's. The first that is there counts.

Images without the labels of their pair have those of another pair, if there is one only."""

_LABELS = tuple(dict.fromkeys(labels for _, labels in _KEYS))

_Fits = Callable[[tuple[int, ...], np.dtype[Any]], bool]


@dataclass(frozen=True, eq=False)
class Samples:
    """Images uint8 (N, H, W, 3), in memory or memory-mapped read-only, with labels int64 (N,) or None.

    ``class_names`` (K,) and the images' ``names`` (N,) are None if the file lacks them. ``checksum`` is the CRC-32 of
    the stored images.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    checksum: int = 0


def read_samples(path: Path) -> Samples:
    """Read the images (arr_0) of a file and, if it has them, its labels (arr_1), class_names and names.

    Images and labels of other names (_KEYS), layouts and types are converted where their meaning is plain (arrays.py).
    Images that are stored uncompressed (np.savez) are memory-mapped and take no memory; compressed ones
    (np.savez_compressed) are read into memory. Either way the entire file is read once, to verify its checksums.

    Raises ValueError if the file is missing, not an npz, damaged or truncated, if it holds anything other than images
    and as many labels (objects are never unpickled), if it claims to hold more than it does, or if it is compressed or
    needs converting and is larger than the available memory.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}: give an npz file of images")
    with _Reader(io.FileIO(os.fspath(path))) as file:
        try:
            with zipfile.ZipFile(file) as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python and NumPy warn about odd headers
                if lacking := missing_files(archive):
                    raise UnfitError(f"is damaged ({lacking}): copy it again")
                there = set(archive.namelist())
                found = next((keys for keys in _KEYS if f"{keys[0]}.npy" in there), None)
                if found is None:
                    *others, last = dict.fromkeys(images for images, _ in _KEYS)
                    raise UnfitError(f"has no {', '.join(others)} or {last} ({_only(archive)}): {WANTED}")
                images = as_images(_read(file, archive, found[0], may_be_images, IMAGES), found[0])
                count = len(images)
                labels = class_names = names = None
                if "class_names.npy" in there:
                    texts = _texts(_read(file, archive, "class_names", partial(_are_texts, None), "text (K,)"))
                    class_names = tuple(map(composed, texts))
                    if len(set(class_names)) != len(class_names):
                        raise UnfitError("has two class_names that are the same: give each class its own name")
                fits, forms = partial(may_be_labels, count), LABELS.format(n=count)
                if f"{found[1]}.npy" in there:
                    stored = np.array(_read(file, archive, found[1], fits, forms))
                    labels, class_names = as_labels(stored, found[1], class_names)
                elif len(others := [name for name in _LABELS if f"{name}.npy" in there]) == 1:
                    with suppress(UnfitError):  # the labels of another pair may be anything, such as a regression's
                        stored = np.array(_read(file, archive, others[0], fits, forms))
                        labels, class_names = as_labels(stored, others[0], class_names)
                if "names.npy" in there:
                    names = _texts(_read(file, archive, "names", partial(_are_texts, count), f"text ({count},)"))
                return Samples(images, labels, class_names, names, archive.getinfo(f"{found[0]}.npy").CRC)
        except UnfitError as error:
            raise ValueError(f"{path} {error}") from None
        except Exception as error:  # zipfile and NumPy raise nearly anything on damaged bytes
            file.seek(0)
            if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
                raise ValueError(f"{path} is one array: {WANTED}") from None
            raise ValueError(
                f"{path} is damaged or not an npz file ({first_line(error)}): copy it again, or {WANTED}"
            ) from None


def read_arrays(path: Path, fits: Mapping[str, _Fits], wanted: str) -> dict[str, NDArray[Any]]:
    """The arrays of an npz that ``fits`` names, each with a test of its shape and type; absent ones are left out.

    The limits are those of read_samples. ValueError, which ends in what is ``wanted``, if an array does not fit, or if
    the file is missing, damaged or no npz.
    """
    if not path.is_file():
        raise ValueError(f"{path} {'is not a file' if path.exists() else 'does not exist'}: {wanted}")
    with _Reader(io.FileIO(os.fspath(path))) as file:
        try:
            with zipfile.ZipFile(file) as archive, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python and NumPy warn about odd headers
                there = set(archive.namelist())
                return {name: _read(file, archive, name, fit) for name, fit in fits.items() if f"{name}.npy" in there}
        except Exception as error:  # zipfile and NumPy raise nearly anything on damaged bytes
            said = str(error).removesuffix(f": {WANTED}") if isinstance(error, UnfitError) else ""
            raise ValueError(f"{path} {said or f'is damaged or no npz file ({first_line(error)})'}: {wanted}") from None


class _Reader(io.BufferedReader):
    """Refuses huge reads, which only a damaged file requests: zipfile reads a directory at its claimed size at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _CHUNK:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
        return super().read(size)


def _are_texts(count: int | None, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "US" and len(shape) == 1 and count in (None, *shape)


def _texts(array: NDArray[Any]) -> tuple[str, ...]:
    return tuple(os.fsdecode(text) for text in array.tolist())  # older writers store bytes


def _only(archive: zipfile.ZipFile) -> str:
    return f"only {printable(', '.join(archive.namelist()[:5])) or 'nothing'}"


def _read(file: _Reader, archive: zipfile.ZipFile, name: str, fits: _Fits, forms: str = "") -> NDArray[Any]:
    """One array of the file, memory-mapped if it is stored uncompressed; ``forms`` says what shapes and types fit."""
    info = archive.getinfo(f"{name}.npy")
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
        raise UnfitError(f"is compressed in a way that NumPy does not know: {WANTED}")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(_HEADER))
        first = npy.read_magic(head) == (1, 0)
        shape, fortran_order, dtype = (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(head)
        if not fits(shape, dtype):
            must = f", which must be {forms}" if forms else ""
            raise UnfitError(f"holds {dtype.name} {shortened(shape)} as {name}{must}: {WANTED}")
        promised, header = math.prod(shape) * dtype.itemsize, head.tell()
        most = min(info.compress_size, os.fstat(file.fileno()).st_size) * (1 if stored else DEFLATE_RATIO)
        if info.file_size != header + promised or info.file_size > most:
            raise UnfitError(f"claims to hold {shortened(shape)} as {name} but does not: copy it again")
        if not stored and promised > available_memory():
            raise UnfitError(
                f"holds {promised / 2**30:.2f} GiB compressed, more than the available memory: "
                "save it with np.savez, which does not compress, so that it is memory-mapped instead"
            )
        values = None if stored else np.empty(promised, np.uint8)
        done = 0
        for part in chain([head.read()], iter(partial(member.read, _CHUNK), b"")):  # to the end, for the checksum
            if values is not None:
                values[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        if done != promised:
            raise EOFError
    order: Literal["C", "F"] = "F" if fortran_order else "C"
    if values is not None:
        return np.ndarray(shape, dtype, values, order=order)
    file.seek(info.header_offset + 26)  # the member's local header, whose lengths may differ from the directory's
    start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))) + header
    return np.memmap(file, dtype, "r", start, shape, order)
