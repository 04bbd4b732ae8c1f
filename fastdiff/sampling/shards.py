"""The finished images of a job, on disk beside its output, so that a killed job can resume."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.checkpoint import Lease, NewerFormat
from fastdiff.data import read_samples
from fastdiff.runtime.files import abandoned, replacing, sync
from fastdiff.sampling.output import Uint8Array, save_npz

FORMAT = "fastdiff-samples-1"
_NEWER = re.compile(r"fastdiff-samples-([2-9]|[1-9][0-9]+)")
_NAME = re.compile(r"([0-9]{6,15})-([0-9]{6,15})\.npz")


def parts_of(out: Path) -> Path:
    """The folder for the shards of the job that writes ``out``."""
    return out.with_name(out.name + ".parts")


class Shards:
    """The settings of a job and its images by position, one file per span: ``000000-000016.npz``.

    Writes are atomic, and processes of one job may add files at the same time. ``option`` is the flag that named the
    output, "" if none did. ValueError if the path is a link or a file, or the folder is not writable.
    """

    def __init__(self, folder: Path, option: str = "--out") -> None:
        self.folder, self.option = folder, option
        self._another = f", or name another {option}" if option else ""
        self._restart = "use --overwrite" if option else f"delete {folder}"
        self._manifest = folder / "job.json"
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ValueError(f"{folder} is not a folder for the unfinished images: remove it{self._another}")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} is not a folder that you may write to: make it writable{self._another}")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start a new job: delete the files of an earlier one and write the settings, which must be values for JSON.

        One process calls this before any process adds images. OSError if the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder.parent)
            self._forget()
            sync(self.folder)  # a power cut must not bring another job's images back beside this manifest
            self.describe(settings)
        except OSError as error:
            why = error.strerror or error
            raise OSError(f"{self.folder} cannot be written to ({why}): make room{self._another}") from error

    def describe(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of the job; its images stay."""
        with replacing(self._manifest) as temporary:
            manifest = {"format": FORMAT, "settings": settings}
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def settings(self) -> dict[str, Any] | None:
        """The settings of the unfinished job, as read from JSON; None if there is no job.

        ValueError if the manifest is damaged, NewerFormat if a later version wrote it.
        """
        try:
            manifest = json.loads(self._manifest.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError):
            manifest = None
        match manifest:
            case {"format": str(written), "settings": dict(settings)} if written == FORMAT:
                return settings
            case {"format": str(written)} if _NEWER.fullmatch(written):
                raise NewerFormat(
                    f"{self._manifest} was made by a newer fastdiff: upgrade this one, or {self._restart}"
                )
        raise ValueError(f"{self._manifest} is damaged: {self._restart} to draw all images again")

    def add(self, start: int, images: Uint8Array) -> None:
        """Save images uint8 (n, H, W, 3) at the positions start to start + n - 1."""
        count, height, width, channels = images.shape
        path = self._path(range(start, start + count))
        try:
            save_npz(path, [images], (count, height, width, channels))
        except OSError as error:
            raise OSError(f"{error}: the finished images stay, and the same command resumes the job") from error

    def spans(self) -> list[range]:
        """The spans of finished positions, in order, each position once.

        Files with other names are ignored. Of two overlapping spans the one that starts later is ignored, too. Spans
        overlap only if two jobs wrote to one folder; both then have the same images, but each must count once.
        """
        spans: list[range] = []
        for span in sorted(self._files(), key=lambda span: (span.start, -span.stop)):
            if not spans or span.start >= spans[-1].stop:
                spans.append(span)
        return spans

    def missing(self, total: int) -> NDArray[np.int64]:
        """The positions below ``total`` that are still to be drawn, in order."""
        missing = np.ones(total, dtype=bool)
        for span in self.spans():
            missing[span.start : span.stop] = False
        return np.flatnonzero(missing)

    def read(self, span: range) -> Uint8Array:
        """The images of one of ``spans()``, uint8 (n, H, W, 3), bit for bit as added; ValueError if damaged."""
        path = self._path(span)
        with suppress(ValueError, OSError):
            images = read_samples(path).images
            if len(images) == len(span) and isinstance(images, np.memmap):  # as added, not converted
                return np.array(images)
        raise ValueError(f"{path} is damaged and counts as missing: the same command draws its images again")

    def drop(self, span: range) -> None:
        """Delete one of ``spans()``; its images then count as missing."""
        self._path(span).unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete the temporary files of killed processes, here and of the output; no other process may be writing."""
        for path in abandoned(self.folder) + abandoned(self.folder.parent, of=self.folder.stem):
            shutil.rmtree(path)

    def remove(self) -> None:
        """Delete the job and its images; no other process may be writing. Foreign files and their folder stay."""
        self._forget()
        self.clean()
        for name in Lease.FILES:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _forget(self) -> None:
        """Delete the manifest, then the images, which belong to no job without it."""
        self._manifest.unlink(missing_ok=True)
        for span in self._files():
            self.drop(span)

    def _files(self) -> list[range]:
        try:
            with os.scandir(self.folder) as entries:
                matches = [_NAME.fullmatch(entry.name) for entry in entries if entry.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        spans = [(match[0], range(int(match[1]), int(match[2]))) for match in matches if match]
        return [span for name, span in spans if span and self._path(span).name == name]

    def _path(self, span: range) -> Path:
        return self.folder / f"{span.start:06d}-{span.stop:06d}.npz"
