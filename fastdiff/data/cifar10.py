"""Convert CIFAR-10's archives to two folders of PNG files, named as in improved-diffusion."""

import io
import pickle
import pickletools
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdiff.data.archives import Member, reading
from fastdiff.data.threads import Progress, in_order
from fastdiff.runtime.files import whole
from fastdiff.runtime.words import first_line, printable

CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_ROWS = 10_000  # images per batch
_PIXELS = 3 * 32 * 32
_BATCH = re.compile(r"(?:data_batch_([1-5])|test_batch)(\.bin)?")
_BATCHES = 6

_Batch = tuple[NDArray[np.uint8], list[int]]  # pixels (N, 3072), labels


def prepare_cifar10(source: Path, out: Path, on_progress: Progress | None = None) -> int:
    """Write out/cifar_train and out/cifar_test, with files like plane_00000.png; returns the number of images.

    ``source`` is cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the folder that one of them unpacks to. The pickles
    of the former cannot execute code. ``on_progress(done, total)`` is called after each image. Raises ValueError if one
    of CIFAR-10's six batches is missing, repeated or invalid, and if ``out`` is not empty.
    """
    with whole(out) as folder:
        for split in ("cifar_train", "cifar_test"):
            (folder / split).mkdir(parents=True)
        with closing(in_order(_save, _images(source, folder))) as results:
            for done, _ in enumerate(results, start=1):
                if on_progress is not None:
                    on_progress(done, _BATCHES * _ROWS)
    return _BATCHES * _ROWS


def _save(item: tuple[Path, NDArray[np.uint8]]) -> None:
    path, image = item
    Image.fromarray(image).save(path)


def _images(source: Path, folder: Path) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
    """Every image (32, 32, 3) with the path to save it to."""
    missing = {*range(1, _BATCHES), None}
    with _files(source) as files:
        for member in files:
            name = member.name.rpartition("/")[2]
            if not (match := _BATCH.fullmatch(name)):
                continue
            number = int(match[1]) if match[1] else None
            if number not in missing:
                raise ValueError(f"{source} holds {name} twice: give one of CIFAR-10's archives as it was downloaded")
            missing.remove(number)
            content = member.read(_ROWS * (2 * _PIXELS + 1024) + 2**16)  # pixels as UTF-8, plus the file names
            pixels, labels = (_binary if match[2] else _pickled)(f"{source}: {name}", content)
            split, first = ("cifar_test", 0) if number is None else ("cifar_train", (number - 1) * _ROWS)
            for i, (row, label) in enumerate(zip(pixels, labels, strict=True), start=first):
                image = np.ascontiguousarray(row.reshape(3, 32, 32).transpose(1, 2, 0))
                yield folder / split / f"{CLASSES[label]}_{i:05d}.png", image
    if missing:
        lacking = ", ".join(f"data_batch_{n}" if n else "test_batch" for n in sorted(missing, key=lambda n: n or 9))
        raise ValueError(f"{source} has no {lacking}: give cifar-10-python.tar.gz or cifar-10-binary.tar.gz")


@contextmanager
def _files(source: Path) -> Iterator[Iterator[Member]]:
    """The files of an archive or a folder."""
    if source.is_dir():
        paths = [p for p in (*source.glob("*"), *source.glob("cifar-10-batches-*/*")) if p.is_file()]
        yield (Member(path, path.name, path.stat().st_size, partial(io.FileIO, path)) for path in sorted(paths))
    else:
        with reading(source) as members:
            yield members


def _binary(name: str, content: bytes) -> _Batch:
    """Parse records of one label and 3,072 pixels, one byte each."""
    if len(content) != _ROWS * (1 + _PIXELS):
        raise ValueError(f"{name} does not have the length of a CIFAR-10 batch: copy it again")
    records = np.frombuffer(content, np.uint8).reshape(_ROWS, 1 + _PIXELS)
    return records[:, 1:], _checked(name, records[:, 0].tolist())


def _pickled(name: str, content: bytes) -> _Batch:
    """Parse a pickled dictionary with data, uint8 (N, 3072), and labels."""
    try:
        _refuse_claims(content)
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        data, labels = (batch[key] for key in (b"data", b"labels"))
    except _CodeError as error:
        raise ValueError(f"{name} asks to run {printable(str(error))}, which no CIFAR-10 batch does") from None
    except Exception as error:  # pickle raises anything on damaged bytes
        raise ValueError(f"{name} is damaged or not a CIFAR-10 batch ({first_line(error)}): copy it again") from None
    if not isinstance(data, _Array) or (data.shape, data.kind) != ((_ROWS, _PIXELS), b"u1"):
        raise ValueError(f"{name} does not hold uint8 ({_ROWS}, {_PIXELS}), so it is not a CIFAR-10 batch")
    if type(data.content) is not bytes or len(data.content) != _ROWS * _PIXELS or data.columns_first:
        raise ValueError(f"{name} is damaged: copy it again")
    return np.frombuffer(data.content, np.uint8).reshape(_ROWS, _PIXELS), _checked(name, labels)


def _refuse_claims(content: bytes) -> None:
    """ValueError if a pickle names more memory than it has bytes: the unpickler would allocate it unseen."""
    for operation, argument, _ in pickletools.genops(content):  # which refuses lengths beyond the end
        # a place in the list of its objects
        if operation.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(content):
            raise ValueError(f"object {argument:,} of a pickle")


def _checked(name: str, labels: Any) -> list[int]:
    known = range(len(CLASSES))
    if type(labels) is list and len(labels) == _ROWS and all(type(x) is int and x in known for x in labels):
        return labels
    raise ValueError(f"{name} does not hold {_ROWS} labels from 0 to 9, so it is not a CIFAR-10 batch")


class _CodeError(pickle.UnpicklingError):
    """A pickle refers to an object that no array needs; the text names it."""


class _Array:
    """Stands in for numpy.ndarray and keeps its pickled state."""

    shape: Any = None
    kind: Any = None
    columns_first: Any = None
    content: Any = None

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, self.columns_first, self.content = state
        self.kind = dtype.name if isinstance(dtype, _Dtype) else None


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.encode() if isinstance(name, str) else name

    def __setstate__(self, state: Any) -> None: ...


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands in for _codecs.encode, by which Python 3 pickles bytes so that Python 2 can read them."""
    if type(text) is not str or encoding not in ("latin1", b"latin1"):
        raise ValueError(f"an encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Resolves only stand-ins for the parts of an array, so that a pickle cannot call anything else."""

    _KNOWN = {  # noqa: RUF012  # a constant
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise _CodeError(f"{module}.{name}") from None
