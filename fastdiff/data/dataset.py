"""A folder or zip of images with class labels, and a one-line summary of what was found and what was left out."""

import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import Labels
from fastdiff.data.classes import composed
from fastdiff.data.images import DEFAULT, Decoding, UnreadableImage, load
from fastdiff.data.kinds import EXTENSIONS, FIRST_EXTENSIONS, START, extension, unread, unread_inside
from fastdiff.data.label_files import EXTENSIONS as LABEL_EXTENSIONS
from fastdiff.data.labelling import Labelling, Source
from fastdiff.data.zipped import ZipMember, zip_members
from fastdiff.runtime.words import printable

_SHOWN = 5


@dataclass(frozen=True)
class LeftOut:
    """A file of the folder that is not used: its name relative to the folder, and the reason."""

    name: str
    reason: str


class ImageFolder:
    """The images of a folder and its sub-folders, decoded on access: ``folder[i]`` is (uint8 (H, W, 3), label).

    A zip file counts as the folder that it was made from. It is read in place, by any number of threads.

    The order is improved-diffusion's: each folder's entries by name, sub-folders in their place among the files. Names
    that start with a dot are skipped; a folder that several links lead to counts once. Files are images by their
    extension (kinds.EXTENSIONS) or, without one, by their content.

    labels: "prefix" takes the file name up to its first underscore as the class (improved-diffusion's rule), "folder"
    takes the top-level sub-folder, "auto" what the files suggest (labelling.py), None gives no labels. ``label_file``,
    a path or a name in the folder, gives the classes instead. Classes are numbered in the order of their names as
    written; ``class_names`` holds them in Unicode's composed form (NFC). ``decoding`` says how images are read.

    Attributes: ``root``, ``image_size``, ``decoding``, ``names`` (relative to root, with "/"), ``paths`` (root / name),
    ``files`` (what to open: the paths, or the members of the zip), ``class_names`` (() without labels),
    ``written_class_names`` (as written, not composed), ``labels`` (int64 (N,) or None), ``left_out`` (files that are
    not used as images), ``label_files`` (those that may hold labels, by name), ``notes`` (lines that say where the
    classes come from, or could).

    Raises ValueError if the folder is missing, is not a folder or has no images; if an image has no class; if the label
    file cannot be used; and if a zip is damaged or has names that lead out of it.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        labels: Labels | str | None = Labels.PREFIX,
        label_file: str = "",
        decoding: Decoding = DEFAULT,
    ) -> None:
        if not str(root):
            raise ValueError("data_dir is empty: give the folder of images")
        if image_size < 1:
            raise ValueError(f"image_size must be positive, not {image_size}")
        if labels is not None and labels not in tuple(Labels):
            raise ValueError(f"labels must be one of {', '.join(Labels)}, not {labels!r}")
        self.root = Path(os.path.expanduser(root))  # Path.expanduser fails for ~nobody
        self.image_size = image_size
        self.decoding = decoding
        self.left_out: list[LeftOut] = []
        members: dict[str, ZipMember] | None = None
        if self.root.is_dir():
            self.names = list(self._scan())
        elif zipfile.is_zipfile(self.root):
            members, replaced = zip_members(self.root, decoding.max_bytes)
            self.left_out += [LeftOut(name, "another file of this name follows") for name in replaced]
            self.names = list(self._scan_zip(members))
        else:
            what = "is not a folder, nor a .zip or .npz of images" if self.root.exists() else "does not exist"
            if self.root.suffix == ".npy" and self.root.exists():
                raise ValueError(f"data_dir {self.root} is one array: save it with np.savez(file, images, labels)")
            raise ValueError(f"data_dir {self.root} {what}: give the folder of images")
        if not self.names:
            raise ValueError(self._nothing_found())
        self.paths = [self.root / name for name in self.names]
        self.files: Sequence[Path | ZipMember]
        self.files = self.paths if members is None else [members[name] for name in self.names]
        # Number the classes of all files found, readable or not: a file that breaks or is repaired must not renumber
        # the classes of a model that was trained before.
        found = self._labelled(None if labels is None else Labels(labels), label_file, members)
        # Sort the names as written, because composing them may change their order: a data set from macOS keeps its
        # class numbers and its fingerprint.
        written: dict[str, str] = {}
        for name in found.order:
            written.setdefault(composed(name), name)
        self.class_names, self.written_class_names = tuple(written), tuple(written.values())
        number = {name: i for i, name in enumerate(self.class_names)}
        self.labels = None if labels is None else np.array([number[composed(c)] for c in found.classes], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int | None]:
        image = load(self.files[index], self.image_size, self.decoding)  # (H, W, 3)
        return image, None if self.labels is None else int(self.labels[index])

    def only(self, rows: Sequence[int]) -> Self:
        """A folder of the images ``rows`` of this one, with the same classes."""
        chosen = copy(self)
        chosen.names, chosen.paths = [self.names[i] for i in rows], [self.paths[i] for i in rows]
        chosen.files = [self.files[i] for i in rows]
        chosen.labels = None if self.labels is None else self.labels[np.array(rows, np.int64)]
        return chosen

    def _scan(self) -> Iterator[str]:
        """Names of images below root in order; everything else goes to left_out."""
        root = self.root.resolve()
        seen = {root, *root.parents}  # a link to a parent would add the folder's siblings
        waiting = self._entries("")
        while waiting:
            name = waiting.pop()
            path = os.path.join(self.root, name)
            if os.path.isdir(path):
                if (folder := Path(path).resolve()) not in seen:
                    seen.add(folder)
                    waiting += self._entries(name)
                continue
            regular = os.path.isfile(path)
            if not self._is_image(name, Path(path) if regular else None):
                continue
            if regular:
                yield name
            else:  # opening a pipe would block forever
                self.left_out.append(LeftOut(name, "broken link" if os.path.islink(path) else "not a regular file"))

    def _scan_zip(self, members: Mapping[str, ZipMember]) -> Iterator[str]:
        """Names of images among the members, in the order of the unpacked folder."""
        for name in sorted(members, key=lambda name: name.split("/")):
            if any(part.startswith(".") for part in name.split("/")):
                continue
            if self._is_image(name, members[name]):
                yield name

    def _is_image(self, name: str, file: Path | ZipMember | None) -> bool:
        """Whether a file counts as an image; if not, it goes to left_out. ``file`` is None if it cannot be opened."""
        first = self.decoding.reading == 1
        reason: str | None
        if extension(name) in (FIRST_EXTENSIONS if first else EXTENSIONS):
            return True
        if extension(name) or file is None or first:
            reason = unread(name) or "not an image"
        else:
            try:
                with file.open("rb") as content:
                    reason = unread_inside(content.read(START))
            except UnreadableImage as error:
                reason = error.reason
            except Exception as error:  # zipfile raises nearly anything
                reason = ((isinstance(error, OSError) and error.strerror) or "damaged").lower()
        if reason is not None:
            self.left_out.append(LeftOut(name, reason))
        return reason is None

    def _labelled(self, labels: Labels | None, label_file: str, members: Mapping[str, ZipMember] | None) -> Labelling:
        """The classes of the images; what was used of left_out is taken from it."""
        names = [item.name for item in self.left_out if extension(item.name) in LABEL_EXTENSIONS]
        places = {name: self.root / name if members is None else members[name] for name in names}
        # opening a pipe would block forever
        self.label_files = {n: place for n, place in places.items() if not isinstance(place, Path) or place.is_file()}
        source = Source(self.root, self.names, self.label_files)
        if labels is None:
            self.notes = source.offer("--class-cond --label-file")
            return Labelling([], [])
        found = source.labelled(labels, label_file)
        self.notes = found.notes + (() if found.used else source.offer("--label-file"))
        self.left_out = [item for item in self.left_out if item.name not in found.used]
        return found

    def _entries(self, folder: str) -> list[str]:
        """The visible entries of a folder as names relative to root, last name first."""
        try:
            entries = sorted(os.listdir(self.root / folder), reverse=True)
        except OSError as error:
            self.left_out.append(LeftOut(folder or ".", (error.strerror or "unreadable folder").lower()))
            return []
        prefix = f"{folder}/" if folder else ""
        return [prefix + entry for entry in entries if not entry.startswith(".")]

    def _nothing_found(self) -> str:
        kinds = Counter(f".{e}" if (e := extension(item.name)) else "other" for item in self.left_out)
        found = ", ".join(f"{count:,} {printable(kind)}" for kind, count in kinds.most_common(_SHOWN))
        packed = "; images inside Parquet files are not read: save them as files" if kinds[".parquet"] else ""
        return (
            f"no images in data_dir {self.root}: looked for {' '.join('.' + e for e in EXTENSIONS)} here and in all "
            f"sub-folders, found {found or 'no files'}{packed}"
        )


@dataclass(frozen=True)
class Preflight:
    """Summary of a folder: image counts by extension, classes, least and greatest (width, height), files left out."""

    counts: dict[str, int]
    class_names: tuple[str, ...]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    left_out: tuple[LeftOut, ...]

    def line(self) -> str:
        """One-line summary, with at most five names of each kind."""
        total = sum(self.counts.values())
        kinds = ", ".join(f"{n:,} {e}" for e, n in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])))
        sizes = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys([self.smallest, self.largest]))
        text = f"{_count(total, 'image', 'images')} ({kinds}, {sizes})"
        if self.class_names:
            text += f" in {_count(len(self.class_names), 'class', 'classes')}: {_listed(self.class_names)}"
        if self.left_out:
            names = [f"{item.name} ({item.reason})" for item in self.left_out]
            text += f"; left out {len(names):,}: {_listed(names)}"
        return text


def extension_counts(names: Sequence[str]) -> dict[str, int]:
    """The number of names with each extension."""
    return dict(Counter(extension(name) or "without extension" for name in names))


def _count(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    return shown + (f", … and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
