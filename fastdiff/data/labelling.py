"""Which class each image of a folder belongs to: by its file name, its sub-folder or a label file."""

import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fastdiff.config import Labels
from fastdiff.data.classes import class_of_file, listed
from fastdiff.data.images import File
from fastdiff.data.label_files import MOST_BYTES, STANDARD, LabelTable, read_label_file
from fastdiff.runtime.words import printable

_PART = re.compile(
    r"(?:(?P<of>.+)[-_ ])?(?:train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?|dev|eval)"
    r"(?:[-_ ]?(?:set|images|data|\d+))?",
    re.IGNORECASE,
)
_FEW = 3  # classes, among which one called train is more likely a part of the data
_OFFERED = 8  # more files with other names than the standard ones are annotations of one image each
_OFFERED_BYTES = 2**24  # what is only named takes no minutes to read


@dataclass(frozen=True)
class Labelling:
    """The class of each image, all classes in order, lines that say how they were found, and the label files used."""

    classes: list[str]
    order: list[str]
    notes: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Source:
    """The images ``names`` below ``root``, a folder or a zip, and the files there that may hold labels, by name."""

    root: Path
    names: Sequence[str]
    label_files: Mapping[str, File]

    def labelled(self, labels: Labels, label_file: str = "") -> Labelling:
        """The classes by the rule ``labels`` or, if it is given, from ``label_file``, a path or a name in the data.

        ValueError if an image has no class.
        """
        if label_file:
            return self._by_given(label_file)
        if labels is Labels.AUTO:
            return self._by_what_is_there()
        return self._by_prefix() if labels is Labels.PREFIX else self._by_folder()

    def offer(self, flags: str) -> tuple[str, ...]:
        """A line that names a label file that would give the images classes, and the ``flags`` that use it."""
        others = [name for name in self.label_files if os.path.basename(name) not in STANDARD]
        standard = [name for name in self.label_files if os.path.basename(name) in STANDARD]
        for name in standard[:_OFFERED] + (others if len(others) <= _OFFERED else []):
            try:
                order = self._table(name, _OFFERED_BYTES).of(self.names)[1]
            except ValueError:
                continue
            if len(order) > 1 and not nearly_as_many(len(order), len(self.names)):
                path = str(self.root / name) if self.root.is_dir() else name
                return (f"labels: {printable(name)} is not used: {flags} {printable(path)} takes the classes from it",)
        return ()

    def _by_prefix(self) -> Labelling:
        classes = [class_of_file(name.rpartition("/")[2]) for name in self.names]
        return Labelling(classes, sorted(set(classes)))

    def _by_folder(self) -> Labelling:
        self._refuse_outside([name.split("/") for name in self.names], self.root)
        classes = [name.partition("/")[0] for name in self.names]
        return Labelling(classes, sorted(set(classes)))

    def _refuse_outside(self, paths: Sequence[Sequence[str]], folder: Path) -> None:
        """ValueError if an image lies in no sub-folder of ``folder``, relative to which ``paths`` are."""
        if outside := _outside(self.names, paths):
            raise ValueError(
                f"labels folder: {_first(outside)} in {folder} itself and so without a class; move each into a "
                "sub-folder named after its class, or use labels prefix"
            )

    def _by_given(self, label_file: str) -> Labelling:
        path, root = Path(label_file), self.root.resolve()
        if path.is_file():
            name, folder = label_file, ""
            if path.resolve().is_relative_to(root):
                name = path.resolve().relative_to(root).as_posix()
                folder = os.path.dirname(name)
            table = read_label_file(path, name, folder)
        elif label_file in self.label_files:
            name, table = label_file, self._table(label_file)
        else:
            raise ValueError(
                f"label_file {label_file} does not exist, nor is it in {self.root}: name a CSV or JSON file"
            )
        return Labelling(*table.of(self.names), used=frozenset((name,)))

    def _by_what_is_there(self) -> Labelling:
        """A label file of a standard name, else the sub-folders if all images are in some, else the file names."""
        notes: list[str] = []
        for standard in STANDARD:
            if files := [name for name in self.label_files if os.path.basename(name) == standard]:
                try:
                    found = _joined([self._table(name) for name in files]).of(self.names)
                except ValueError as error:
                    notes.append(f"labels: {error}; it is not used")
                    continue
                if not nearly_as_many(len(found[1]), len(self.names)):
                    return Labelling(*found, (f"labels: the classes come from {listed(files)}",), frozenset(files))
                notes.append(f"labels: {listed(files)} has nearly one class per image; it is not used")
        paths, above, parts = _without_parts([name.split("/") for name in self.names])
        by_prefix, one = self._by_prefix(), ""
        if parts and self.root.is_dir():
            part = next((part for part in parts if "train" in part.lower()), parts[0])
            one = f"; --data-dir {printable(str(self.root / above / part))} takes one part"
        folders = [path[0] for path in paths if len(path) > 1]
        if len(folders) == len(paths) and folders != by_prefix.classes:
            of = f" of {listed(parts) if parts else printable(above)}" if parts or above else ""
            odd = "" if parts else _parts_among(set(folders), self.root / above)
            notes.append(f"labels: the sub-folders{of} are the classes; --labels prefix takes the file names{one}{odd}")
            return Labelling(folders, sorted(set(folders)), tuple(notes))
        if len(set(folders)) > 1 and nearly_as_many(len(by_prefix.order), len(paths)):
            self._refuse_outside(paths, self.root / above)
        outside = _outside(self.names, paths)
        inside = {kind for kind, path in zip(by_prefix.classes, paths, strict=True) if len(path) > 1}
        if len(outside) < len(folders) and len(inside) < len(set(folders)):  # such as IMG_0001.jpg in all of them
            notes.append(
                f"labels: the file names hold the classes, because {_first(outside)} in no sub-folder; else the "
                f"sub-folders were the classes: {listed(sorted(set(folders)))}"
            )
        if parts:
            notes.append(f"labels: the file names hold the classes, in all of {listed(parts)}{one}")
        return Labelling(by_prefix.classes, by_prefix.order, tuple(notes))

    def _table(self, name: str, most: int = MOST_BYTES) -> LabelTable:
        return read_label_file(self.label_files[name], name, os.path.dirname(name), most)


def _outside(names: Sequence[str], paths: Sequence[Sequence[str]]) -> list[str]:
    """The names whose ``paths`` have no sub-folder."""
    return [name for name, path in zip(names, paths, strict=True) if len(path) == 1]


def _first(names: Sequence[str]) -> str:
    """The subject and verb of a sentence about where images lie."""
    return f"{printable(names[0])} and {len(names) - 1:,} more lie" if len(names) > 1 else f"{printable(names[0])} lies"


def nearly_as_many(classes: int, images: int) -> bool:
    """Whether there are so many classes that most have a single image: they teach a model nothing."""
    return images > 10 and classes > images / 2


def _joined(tables: Sequence[LabelTable]) -> LabelTable:
    """One table of the tables that lie in the parts of a data set."""
    first = tables[0]
    if len(tables) == 1:
        return first
    classes = {key: value for table in tables for key, value in table.classes.items()}
    if len({type(value) for value in classes.values()}) > 1:
        classes = {key: str(value) for key, value in classes.items()}
    return LabelTable(first.name, classes, first.names)  # type: ignore[arg-type]  # of one type


def _parts_among(classes: Set[str], folder: Path) -> str:
    """A phrase about classes that are called like the parts of a data set, or an empty text if there is no doubt."""
    found = sorted(name for name in classes if _PART.fullmatch(name))
    if not found or (len(found) == 1 and len(classes) > _FEW):
        return ""  # one of many kinds of vehicles
    part = next((name for name in found if "train" in name.lower()), found[0])
    one = f"--data-dir {printable(str(folder / part))}" if folder.is_dir() else "a zip of one part"
    return f"; warning: {listed(found)} became {'classes' if len(found) > 1 else 'a class'}: for a part use {one}"


def _without_parts(paths: list[list[str]]) -> tuple[list[list[str]], str, list[str]]:
    """The paths without folders that cannot be classes: one around everything, and parts such as train and test.

    Also returns the path of the folder around everything, and the names of the parts.
    """
    above: list[str] = []
    parts: list[str] = []
    while all(len(path) > 1 for path in paths):
        firsts = sorted({path[0] for path in paths})
        if len(firsts) > 1:
            matches = [_PART.fullmatch(first) for first in firsts]
            if parts or not all(matches) or len({match["of"] for match in matches if match}) > 1:
                break
            parts = firsts
        elif not parts:
            above += firsts
        paths = [path[1:] for path in paths]
    return paths, "/".join(above), parts
