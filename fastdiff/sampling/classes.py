"""The class of each image: a function of its number, so that any part of a job draws the same images."""

import difflib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import ClassMix
from fastdiff.data.classes import completed, composed
from fastdiff.kernels import philox_uint32

CLASS_STREAM = 0xFFFFFFFF
"""The Philox step reserved for classes; a sampling loop counts its steps from 0."""


def labels_of(
    checkpoint: Checkpoint,
    indices: NDArray[np.int64],
    classes: Sequence[str | int] = (),
    mix: ClassMix = ClassMix.BALANCED,
    seed: int = 0,
) -> NDArray[np.int64] | None:
    """The class indices (N,) of the images ``indices`` (N,); None for an unconditional model.

    ``classes`` are taken in turn, each a name or, unless some class has a number as its name, an index. Without them
    all classes are taken in turn, or drawn with the frequencies stored in the checkpoint if ``mix`` is data. ValueError
    if a class is unknown, the model is unconditional, or the checkpoint stores no frequencies.
    """
    config = checkpoint.model_config
    if not config.class_cond:
        if classes:
            raise ValueError(f"class {classes[0]}: this model was trained without classes (class_cond)")
        return None
    if classes:
        return np.array([_number(checkpoint, wanted) for wanted in classes])[indices % len(classes)]
    if mix is ClassMix.BALANCED:
        return indices % config.num_classes
    counts = checkpoint.metadata.get("class_counts")
    if not counts:
        raise ValueError(
            "class_mix data: the checkpoint does not say how many images of a class it was trained on; leave it out"
        )
    words = philox_uint32(seed, torch.from_numpy(indices), CLASS_STREAM, 1)[:, 0].numpy()
    # in integers: no rounding can exceed the last class
    return np.searchsorted(list(accumulate(counts)), (words * sum(counts)) >> 32, side="right")


def _number(checkpoint: Checkpoint, wanted: str | int) -> int:
    names, count = checkpoint.class_names, checkpoint.model_config.num_classes
    text, called = composed(str(wanted)), names_of(checkpoint)
    if text in called:
        return called.index(text)
    if text.isdecimal() and len(text) < 10 and int(text) < count and not any(name.isdecimal() for name in names):
        return int(text)
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or names[:10]
    known = f"; there are {', '.join(near)}{' and more' if len(names) > len(near) else ''}" if names else ""
    raise ValueError(f"class {text!r} is none of the model's {count} classes{known}")


def split_classes(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """Split "cat,dog,7" into its classes; a class name that contains a comma is not split."""
    return (text,) if composed(text) in names else tuple(part.strip() for part in text.split(","))


def names_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the model's classes, or their numbers if they have none; () for an unconditional model."""
    config = checkpoint.model_config
    if not config.class_cond:
        return ()
    return completed(checkpoint.class_names, config.num_classes)
