"""The class of each image: a function of its number, so that any part of a job draws the same images."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint
from fastdiff.config import ClassMix
from fastdiff.data.classes import completed, composed
from fastdiff.kernels import philox_uint32

CLASS_STREAM = 0xFFFFFFFF
"""The Philox step reserved for classes; a sampling loop counts its steps from 0."""


@dataclass(frozen=True)
class Classes:
    """The classes to draw: those of a model or, if it is unconditional, of the classifier that guides it.

    ``names`` has a name for every class, its number if it has no other; ``named`` are the given ones. ``counts`` are
    the training images of each class, or empty.
    """

    names: tuple[str, ...]
    named: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, classifier: ClassifierCheckpoint | None = None) -> Self | None:
        """The classes of a checkpoint, of its classifier, or None."""
        config, names = checkpoint.model_config, checkpoint.class_names
        if classifier is not None:
            names = names or classifier.class_names
        elif not config.class_cond:
            return None
        count = classifier.config.num_classes if classifier is not None else config.num_classes
        metadata = checkpoint.metadata if config.class_cond or classifier is None else classifier.metadata
        return cls(completed(names, count), names, tuple(metadata.get("class_counts", ())))

    def number(self, wanted: str | int) -> int:
        """The index of a class given by its name or, unless some class has a number as its name, by its index."""
        text = composed(str(wanted))
        if text in self.names:
            return self.names.index(text)
        count, called = len(self.names), self.named
        if text.isdecimal() and len(text) < 10 and int(text) < count and not any(name.isdecimal() for name in called):
            return int(text)
        near = difflib.get_close_matches(text, called, n=3, cutoff=0.4) or called[:10]
        known = f"; there are {', '.join(near)}{' and more' if len(called) > len(near) else ''}" if called else ""
        raise ValueError(f"class {text!r} is none of the model's {count} classes{known}")


def labels_of(
    known: Classes | None,
    indices: NDArray[np.int64],
    classes: Sequence[str | int] = (),
    mix: ClassMix = ClassMix.BALANCED,
    seed: int = 0,
) -> NDArray[np.int64] | None:
    """The class indices (N,) of the images ``indices`` (N,); None if no classes are ``known``.

    ``classes`` are taken in turn, as Classes.number reads them. Without them all classes are taken in turn, or drawn
    with the frequencies stored in the checkpoint if ``mix`` is data. ValueError if a class is unknown, there are no
    classes, or the checkpoint stores no frequencies.
    """
    if known is None:
        if classes:
            raise ValueError(
                f"class {classes[0]}: this model was trained without classes (class_cond); a classifier can guide it "
                "(--classifier)"
            )
        return None
    if classes:
        return np.array([known.number(wanted) for wanted in classes])[indices % len(classes)]
    if mix is ClassMix.BALANCED:
        return indices % len(known.names)
    if not known.counts:
        raise ValueError(
            "class_mix data: the checkpoint does not say how many images of a class it was trained on; leave it out"
        )
    words = philox_uint32(seed, torch.from_numpy(indices), CLASS_STREAM, 1)[:, 0].numpy()
    # in integers: no rounding can exceed the last class
    return np.searchsorted(list(accumulate(known.counts)), (words * sum(known.counts)) >> 32, side="right")


def split_classes(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """Split "cat,dog,7" into its classes; a class name that contains a comma is not split."""
    return (text,) if composed(text) in names else tuple(part.strip() for part in text.split(","))
