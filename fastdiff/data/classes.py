"""Names of classes: how they are compared, written as the names of files, and found again in another file."""

import re
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastdiff.data.words import printable

Labels = NDArray[np.int64]

_CODED = "/\\\0_"
_CODE = re.compile("%(2E|2F|3A|5C|00|5F|25)")
_SHOWN = 10


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC): a Mac's folders and Linux's then have the same names."""
    return unicodedata.normalize("NFC", name)


def file_name_of(name: str) -> str:
    """A class's name as the beginning of a file's name, up to whose first underscore class_of_file reads it back.

    What would lead out of the folder, hide the file or end the name stands as in a URL: red_car is red%5Fcar. A percent
    sign does where it could be taken for one of these.
    """
    coded = _CODE.sub(lambda match: "%25" + match[1], name)
    coded = "".join(f"%{ord(c):02X}" if c in _CODED else c for c in coded)
    if re.match("[A-Za-z]:", coded):  # a drive, to Windows and to who opens a zip
        coded = coded.replace(":", "%3A", 1)
    return "%2E" + coded[1:] if coded.startswith(".") else coded


def class_of_file(name: str) -> str:
    """The class that a file's name begins with, up to its first underscore (improved-diffusion's rule)."""
    coded = name.split("_")[0]
    if "%" not in coded:
        return coded
    plain = _CODE.sub(lambda match: chr(int(match[1], 16)), coded)
    return plain if file_name_of(plain) == coded else coded  # else the code is part of the name


def completed(names: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of a model's ``count`` classes; those without one are called by their numbers."""
    given = tuple(map(composed, names))
    return given + tuple(str(i) if str(i) not in given else f"class {i}" for i in range(len(given), count))


def listed(names: Sequence[str]) -> str:
    """The first of many names, for an error."""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + (" and more" if len(names) > _SHOWN else "")


def renumbered(
    labels: Labels,
    names: Sequence[str] | None,
    known: Sequence[str],
    count: int,
    source: object,
    remedy: str,
    npz: bool = False,
) -> Labels:
    """The classes of N images as a model numbers them, int64 (N,).

    ``labels`` (N,) number the classes as ``source`` does, which calls them ``names``, or has no names for them (None).
    ``known`` are the names of the model's ``count`` classes, () where it has none: then names that are numbers are its
    numbers. Classes are matched by name; where one side has none by number, with a warning. Of an ``npz`` the names 0
    to K - 1, which the model lacks, are none: a model without names drew it. ValueError, which ends in the ``remedy``,
    where the model lacks a class.
    """
    if npz and names is not None and tuple(names) == tuple(map(str, range(len(names)))):
        called = set(completed(known, count))
        names = names if all(names[i] in called for i in set(labels.tolist()) if 0 <= i < len(names)) else None
    numbers = names is not None and all(name.isdecimal() and name.isascii() for name in names)
    if names is not None and (known or numbers):
        return _by_name(labels, [composed(name) for name in names], known, count, source, remedy)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= count:
        other = least if least < 0 else most
        raise ValueError(f"{source} has the class {other}, and the model the classes 0 to {count - 1}: {remedy}")
    if names is None:
        first = f", 0 being {printable(known[0])}" if known else ""
        warnings.warn(
            f"{source} has no class_names: its labels are read as numbers of the model's classes{first}", stacklevel=3
        )
    else:
        warnings.warn(
            f"the model has no names of its classes: those of {source} are numbered in their order, 0 being "
            f"{printable(names[0])}",
            stacklevel=3,
        )
    return labels


def _by_name(
    labels: Labels, names: Sequence[str], known: Sequence[str], count: int, source: object, remedy: str
) -> Labels:
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"{source} has labels from {labels.min()} to {labels.max()}, which must be from 0 to {len(names) - 1}, "
            "the numbers of its class_names: save it again"
        )
    number = {name: i for i, name in reversed(list(enumerate(completed(known, count))))}
    found = np.array([number.get(name, -1) for name in names], np.int64)[labels]
    if found.min() < 0:
        stranger, there = printable(names[labels[found.argmin()]]), listed(known or completed((), count))
        raise ValueError(
            f"{source} has the class {stranger!r}, which the model does not know; it knows {there}: {remedy}"
        )
    return found
