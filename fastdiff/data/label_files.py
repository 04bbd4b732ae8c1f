"""Classes from a file beside the images: dataset.json of StyleGAN and EDM, metadata.csv and .jsonl of Hugging Face
datasets, and any other CSV or JSON that names files and their classes.
"""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdiff.data.images import File
from fastdiff.data.kinds import extension
from fastdiff.runtime.words import first_line, printable

STANDARD = ("dataset.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")
"""The names that other projects give to label files. The last one is only named, not read."""

EXTENSIONS = ("csv", "tsv", "json", "jsonl", "parquet")

MOST_BYTES = 2**28
"""Larger label files are refused."""

# Names of columns: the first one that is there counts, a class's name before its number.
_FILE = (
    *("file_name", "filename", "file", "image_path", "image_file", "image_name", "image", "filepath", "path", "img"),
    *("image_id", "id", "name"),
)
_CLASS = ("class_name", "label_name", "class", "label", "category", "species", "target", "labels", "classes", "y")
_NO_CLASS = ("text", "caption", "prompt", "description", "width", "height")
_CLASS_NAMES = ("class_names", "classes")
_MOST_NUMBER = 10**6  # greater numbers are names
_PARQUET = b"PAR1"
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,6})(\.0*)?")  # 007 is a name
_WANTED = 'wanted are columns file_name and label, or JSON such as {"labels": [["a.png", 0], ["b.png", 1]]}'

_Rows = Iterable[tuple[str, Any]]  # files and their classes


class NoLabels(ValueError):
    """A file does not give the classes of the images; the text says why, and what is wanted."""


@dataclass(frozen=True)
class LabelTable:
    """The class of each file in the label file ``name``: all of them names, or all of them numbers.

    ``names`` are those of the numbers 0, 1, ..., if the label file has them.
    """

    name: str
    classes: Mapping[str, str] | Mapping[str, int]
    names: tuple[str, ...] | None = None

    def of(self, images: Sequence[str]) -> tuple[list[str], list[str]]:
        """The class of each image, and all classes in order: those that are numbers by number, others by name.

        An image is found by its path, with or without the extension; the label file's path may lack the first folders
        of the image's, or have more of them. Raises NoLabels if an image has no class.
        """
        keys = list(images) if all(image in self.classes for image in images) else self._keys(images)
        if missing := [image for image, key in zip(images, keys, strict=True) if not key]:
            raise NoLabels(
                f"{printable(self.name)} has no class for {len(missing):,} of {len(images):,} images, the first is "
                f"{printable(missing[0])}: add it, or move the image away"
            )
        values = [self.classes[key] for key in keys]
        if self.names is not None and all(isinstance(value, int) and value < len(self.names) for value in values):
            return [self.names[int(value)] for value in values], list(self.names)
        return list(map(str, values)), [str(value) for value in sorted(set(values))]

    def _keys(self, images: Sequence[str]) -> list[str]:
        """The path of each image in the label file; empty for an image without one, or with another image's."""
        whole: dict[str, str] = {}
        ends: dict[str, str] = {}
        for key in self.classes:
            for form in _forms(key):
                whole[form] = "" if form in whole else key  # two files share it
            for end in _ends(key):
                ends[end] = "" if end in ends else key
        found = [
            next((whole[end] for end in _ends(image) if whole.get(end)), "")
            or next((ends[form] for form in _forms(image) if ends.get(form)), "")
            for image in images
        ]
        uses = Counter(found)
        return [key if uses[key] == 1 else "" for key in found]


def _forms(path: str) -> tuple[str, ...]:
    """The path, and the path without its extension."""
    return tuple(dict.fromkeys((path, os.path.splitext(path)[0])))


def _ends(path: str) -> list[str]:
    """The forms of a path, then those of what is left of it without its first folder, and so on."""
    parts = path.split("/")
    return [form for i in range(len(parts)) for form in _forms("/".join(parts[i:]))]


def read_label_file(file: File, name: str, folder: str = "", most: int = MOST_BYTES) -> LabelTable:
    """The classes in a label file called ``name``, whose paths are relative to ``folder``, "" being the data's root.

    Raises NoLabels if it holds none, and ValueError if it is damaged, has more than ``most`` bytes or cannot be read.
    """
    try:
        with file.open("rb") as content:
            raw = content.read(len(_PARQUET))
            raw += b"" if raw == _PARQUET else content.read(most + 1 - len(raw))
    except Exception as error:  # zipfile and its decompressors raise nearly anything
        said = error.strerror.lower() if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ValueError(f"{printable(name)} cannot be read ({said}): copy it again") from None
    if raw == _PARQUET:
        csv_name = os.path.basename(os.path.splitext(name)[0]) + ".csv"
        raise ValueError(
            f"{printable(name)} is in Parquet, which is not read here: save it as {printable(csv_name)}, such as with "
            "pandas.read_parquet(FILE).to_csv(FILE, index=False)"
        )
    if len(raw) > most:
        raise ValueError(f"{name} has more than {most:,} bytes: give a file with nothing but the classes")
    try:
        text = raw.decode("utf-8-sig")
        read = {"json": _from_json, "jsonl": _from_json_lines}.get(extension(name), _from_table)
        rows, names = read(text)
        classes: dict[str, str | int] = {}
        for path, given in rows:
            if (value := _value(given)) is not None and classes.setdefault(key := _key(folder, path), value) != value:
                raise NoLabels(f"gives {printable(key)} two classes, {printable(f'{classes[key]} and {value}')}")
    except NoLabels as error:
        raise NoLabels(f"{printable(name)} {error}: {_WANTED}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{printable(name)} is not in UTF-8: save it so") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{printable(name)} is damaged ({first_line(error)}): {_WANTED}") from None
    if not classes:
        raise NoLabels(f"{printable(name)} has no class for any file: {_WANTED}")
    numbers = {key: value for key, value in classes.items() if isinstance(value, int)}
    if len(numbers) == len(classes):
        return LabelTable(name, numbers, names)
    return LabelTable(name, {key: str(value) for key, value in classes.items()})


def _from_json(text: str) -> tuple[_Rows, tuple[str, ...] | None]:
    try:
        content = json.loads(text)
    except ValueError:
        return _from_json_lines(text)
    names = None
    if isinstance(content, dict) and "labels" in content:
        listed = next((content[key] for key in _CLASS_NAMES if isinstance(content.get(key), list)), None)
        if listed is not None and all(isinstance(name, str) for name in listed):
            names = tuple(listed)
        content = content["labels"]
    if isinstance(content, dict):
        if all(isinstance(value, dict) for value in content.values()):
            return _from_columns([{_FILE[0]: path, **row} for path, row in content.items()]), names
        return content.items(), names
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return _from_columns(content), names
    if isinstance(content, list) and all(isinstance(row, list) and len(row) == 2 for row in content):
        return [(str(path), label) for path, label in content], names
    raise NoLabels("has no labels")  # StyleGAN's tool writes null for images without classes


def _from_json_lines(text: str) -> tuple[_Rows, tuple[str, ...] | None]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise NoLabels("has lines that are not objects")
    return _from_columns(rows), None


def _from_table(text: str) -> tuple[_Rows, tuple[str, ...] | None]:
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    if not rows:
        raise NoLabels("is empty")
    columns = [column.strip() for column in rows[0]]
    if len(columns) == 2 and _among(columns, _FILE) is None and extension(columns[0]):  # no header
        return [(row[0], row[1]) for row in rows if len(row) == 2], None
    return _from_columns([dict(zip(columns, row, strict=False)) for row in rows[1:]]), None


def _from_columns(rows: Sequence[Mapping[str, Any]]) -> _Rows:
    """Files and classes from rows with named columns; without one of classes, the name of the column that holds 1."""
    if not rows:
        return []
    columns = list(dict.fromkeys(column for row in rows for column in row))
    told = printable(", ".join(columns[:8]))
    if (file := _among(columns, _FILE)) is None:
        raise NoLabels(f"has no column with the files ({told})")
    others = [column for column in columns if column != file and _among([column], _NO_CLASS) is None]
    label = others[0] if len(others) == 1 else _among(others, _CLASS)
    if label is not None:
        return [(str(row[file]), row.get(label)) for row in rows if row.get(file)]
    values = [[_as_float(row.get(column)) for column in others] for row in rows]
    if all(sorted(row, key=float) == [0.0] * (len(others) - 1) + [1.0] for row in values):
        return [(str(row[file]), others[hot.index(1.0)]) for row, hot in zip(rows, values, strict=True)]
    raise NoLabels(f"has no column with the classes ({told})")


def _among(columns: Sequence[str], known: Sequence[str]) -> str | None:
    """The column whose name comes first in ``known``."""
    named = {column.strip().lower().replace(" ", "_"): column for column in reversed(columns)}
    return next((named[name] for name in known if name in named), None)


def _value(value: Any) -> str | int | None:
    """A class as a number or a name; None if there is none. A list counts as one-hot."""
    if isinstance(value, list):
        hot = [_as_float(x) for x in value]
        if sorted(hot, key=float) != [0.0] * (len(hot) - 1) + [1.0]:
            raise NoLabels("has vectors that are not one-hot")
        return hot.index(1.0)
    text = "" if value is None else str(value).strip()
    if (number := _NUMBER.fullmatch(text)) is not None and int(number[1]) < _MOST_NUMBER:
        return int(number[1])
    return text or None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _key(folder: str, path: str) -> str:
    parts = [part for part in f"{folder}/{path}".replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(parts)
