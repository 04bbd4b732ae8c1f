"""Images and labels from arrays of other layouts and types, where their meaning is plain."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.data.cache import available_memory
from fastdiff.data.classes import composed
from fastdiff.runtime.words import printable

WANTED = "save uint8 images (N, H, W, 3) and integer labels (N,) with np.savez(file, images, labels)"

IMAGES = "numbers (N, H, W), (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels C"
LABELS = "whole numbers or text ({n},) or ({n}, 1), or one-hot ({n}, K)"
"""What the arrays of images and labels must be, in words; n is the number of images."""

_PART = 2**22  # values that are converted at a time
_CHANNELS = (1, 3, 4)


class UnfitError(ValueError):
    """A file cannot be used; the text says why, and the remedy, and follows the file's name."""


def may_be_images(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an array may hold images: numbers (N, H, W), or (N, H, W, C) or (N, C, H, W) of 1, 3 or 4 channels."""
    if dtype.kind not in "biuf" or min(shape, default=0) < 1:
        return False
    if len(shape) == 3:
        return shape[2] not in _CHANNELS  # otherwise it may be one image (H, W, C)
    return len(shape) == 4 and (shape[3] in _CHANNELS or (shape[1] in _CHANNELS and min(shape[2:]) >= shape[1]))


def may_be_labels(count: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an array may hold the labels of ``count`` images: numbers or text (N,) or (N, 1), or one-hot (N, K)."""
    return dtype.kind in "biufUS" and len(shape) in (1, 2) and shape[0] == count and min(shape) > 0


def as_images(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """The images uint8 (N, H, W, 3) in an array that may_be_images; those that are already so are not copied.

    Grey becomes RGB, and transparency lies over white. Floats are from 0 to 1, -1 to 1 or 0 to 255, other integers from
    0 to 255, and truth values are black and white. Raises UnfitError for other values, and if memory is too small.
    """
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[3] not in _CHANNELS:
        array = np.moveaxis(array, 1, 3)
    if array.dtype == np.uint8 and array.shape[3] == 3 and array.flags.forc:
        return array
    scale, shift = _scale(array, name)
    shape = (*array.shape[:3], 3)
    if (needed := int(np.prod(shape, dtype=np.int64))) > available_memory():
        raise UnfitError(
            f"holds {array.dtype.name} as {name}, which take {needed / 2**30:.2f} GiB as uint8 RGB, more than the "
            f"available memory: {WANTED}"
        )
    images = np.empty(shape, np.uint8)
    step = max(1, _PART // int(np.prod(array.shape[1:])))
    for at in range(0, len(array), step):
        part = array[at : at + step]
        if (scale, shift) != (1, 0) or part.dtype.kind == "f":
            part = np.clip(np.rint(part.astype(np.float32) * scale + shift), 0, 255)
        values = part.astype(np.uint8)
        if values.shape[3] == 4:
            alpha = values[..., 3:].astype(np.uint16)
            values = ((values[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        images[at : at + step] = values  # one channel becomes three
    return images


def _scale(array: NDArray[Any], name: str) -> tuple[float, float]:
    """What to multiply the values with and to add, so that they are from 0 to 255."""
    if array.dtype == np.uint8:
        return 1, 0
    least, most = array.min(), array.max()
    ranges = "integers must be from 0 to 255"
    if array.dtype.kind == "b":
        return 255, 0
    if array.dtype.kind in "iu" and least >= 0 and most <= 255:
        return 1, 0
    if array.dtype.kind == "f":
        ranges = "floats must be from 0 to 1, from -1 to 1, or from 0 to 255 with one above 127"
        if least >= 0 and most <= 1:
            return 255, 0
        if -1 <= least < 0 and most <= 1:
            return 127.5, 127.5
        if least >= 0 and 127 < most <= 255:
            return 1, 0
    raise UnfitError(f"holds {array.dtype.name} from {least:g} to {most:g} as {name}, and {ranges}: {WANTED}")


def as_labels(
    array: NDArray[Any], name: str, class_names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """The labels (N,) in an array that may_be_labels, and the names of the classes, None if they have none.

    Raises UnfitError for floats that are not whole, rows that are not one-hot, and text that is in no ``class_names``.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind in "US":
        if array.ndim == 2:
            forms = LABELS.format(n=len(array))
            raise UnfitError(f"holds {array.dtype.name} {array.shape} as {name}, which must be {forms}: {WANTED}")
        return _from_text(array, name, class_names)
    values = array.astype(np.int64)
    if (values != array).any():
        raise UnfitError(f"holds {array.dtype.name} that are no whole numbers as {name}: {WANTED}")
    if array.ndim == 1:
        return values, class_names
    if not (((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all()):
        raise UnfitError(f"holds rows of {array.shape[1]} numbers that are not one-hot as {name}: {WANTED}")
    return values.argmax(axis=1), class_names


def _from_text(
    array: NDArray[Any], name: str, class_names: tuple[str, ...] | None
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    texts = [composed(os.fsdecode(text)) for text in array.tolist()]
    known = tuple(sorted(set(texts))) if class_names is None else class_names
    if unknown := sorted(set(texts) - set(known)):
        raise UnfitError(f"holds the class {printable(unknown[0])!r} as {name}, which is not in its class_names")
    number = {text: i for i, text in enumerate(known)}
    return np.array([number[text] for text in texts], np.int64), known
