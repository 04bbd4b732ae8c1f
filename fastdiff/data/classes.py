"""Class names: how they are compared, encoded in file names, and matched between a file and a model."""

import re
import unicodedata
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastdiff.runtime.words import printable

Labels = NDArray[np.int64]

_CODED = "/\\\0_"
_CODE = re.compile("%(2E|2F|3A|5C|00|5F|25)")
_SHOWN = 10


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC), in which macOS and Linux folders have the same names."""
    return unicodedata.normalize("NFC", name)


def file_name_of(name: str) -> str:
    """Encode a class name as the prefix of a file name; class_of_file reads it back up to the first underscore.

    Characters that would lead out of the folder, hide the file or end the prefix are percent-encoded: red_car becomes
    red%5Fcar. A percent sign is encoded if it could be read as such a code.
    """
    coded = _CODE.sub(lambda match: "%25" + match[1], name)
    coded = "".join(f"%{ord(c):02X}" if c in _CODED else c for c in coded)
    if re.match("[A-Za-z]:", coded):  # a drive letter to Windows and to zip tools
        coded = coded.replace(":", "%3A", 1)
    return "%2E" + coded[1:] if coded.startswith(".") else coded


def class_of_file(name: str) -> str:
    """The class that a file name starts with, up to its first underscore (improved-diffusion's rule)."""
    coded = name.split("_")[0]
    if "%" not in coded:
        return coded
    plain = _CODE.sub(lambda match: chr(int(match[1], 16)), coded)
    return plain if file_name_of(plain) == coded else coded  # otherwise the code is part of the name


def completed(names: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of a model's ``count`` classes; a class without a name is named by its number."""
    given = tuple(map(composed, names))
    return given + tuple(str(i) if str(i) not in given else f"class {i}" for i in range(len(given), count))


def listed(names: Sequence[str]) -> str:
    """The first few names, for an error message."""
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
    """The class labels of N images in the model's numbering, int64 (N,).

    ``labels`` (N,) are in the numbering of ``source``, whose class names are ``names``, or None if it has none.
    ``known`` are the names of the model's ``count`` classes, or () if it has none; then names that are numbers count as
    its class numbers. Classes are matched by name or, if one side has no names, by number, with a warning. In an
    ``npz``, names 0 to K - 1 that the model lacks do not count as names: a model without names sampled it. Raises
    ValueError, which ends in the ``remedy``, if the model lacks a class.
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
        raise ValueError(f"{source} has the class {other}, but the model has the classes 0 to {count - 1}: {remedy}")
    if names is None:
        first = f", 0 being {printable(known[0])}" if known else ""
        warnings.warn(
            f"{source} has no class_names: its labels are taken as the model's class numbers{first}", stacklevel=3
        )
    else:
        warnings.warn(
            f"the model has no class names: the classes of {source} are numbered in their order, 0 being "
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
