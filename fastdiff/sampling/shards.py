"""What a job has drawn so far, on disk beside its output, so that one that is killed goes on where it was."""

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

from fastdiff.checkpoint import Lease, NewerFormat, replacing
from fastdiff.checkpoint.files import abandoned, sync_folder
from fastdiff.data import read_samples
from fastdiff.sampling.output import Uint8Array, save_npz

FORMAT = "fastdiff-samples-1"
_NEWER = re.compile(r"fastdiff-samples-([2-9]|[1-9][0-9]+)")
_NAME = re.compile(r"([0-9]{6,15})-([0-9]{6,15})\.npz")


def parts_of(out: Path) -> Path:
    """The folder for the shards of the job that writes ``out``."""
    return out.with_name(out.name + ".parts")


class Shards:
    """The images of a job by their positions in it, a span of them a file ``000000-000016.npz``, and its settings.

    Every file is whole or absent. Processes of one job may add to the folder at the same time. ValueError where the
    folder is no folder of one's own to write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = folder / "job.json"
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ValueError(f"{folder} is in the way of the unfinished images: remove it, or name another --out")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"{folder} is not a folder that you may write to: name another --out")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin a job anew: what another one left is deleted, and the settings, which JSON must hold, are written.

        To be called by one process, before any adds. OSError where the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            self._forget()
            sync_folder(self.folder)  # or, after a power cut, another job's images might be back beside this manifest
            with replacing(self._manifest) as temporary:
                manifest = {"format": FORMAT, "settings": settings}
                temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            why = error.strerror or error
            raise OSError(f"{self.folder} cannot be written to ({why}): make room, or name another --out") from error

    def settings(self) -> dict[str, Any] | None:
        """The settings of the unfinished job as JSON gives them back; None where there is none.

        ValueError where they are damaged, NewerFormat where a later version wrote them.
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
                    f"{self._manifest} was made by a newer fastdiff: upgrade this one, or use --overwrite"
                )
        raise ValueError(f"{self._manifest} is damaged: use --overwrite to draw all images anew")

    def add(self, start: int, images: Uint8Array) -> None:
        """Keep images uint8 (n, H, W, 3), those of the positions start to start + n - 1."""
        count, height, width, channels = images.shape
        path = self._path(range(start, start + count))
        try:
            save_npz(path, [images], (count, height, width, channels))
        except OSError as error:
            raise OSError(f"{error}: the finished images stay, and the same command goes on from there") from error

    def spans(self) -> list[range]:
        """The positions that are there, in order and each once.

        Files of other names are passed over. So is, where two overlap, the one that begins later: none does unless two
        jobs were let loose on one folder, and then both have the same images, but the count must come out right.
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
        """The images of one of ``spans()``, uint8 (n, H, W, 3), bit for bit as they were added; ValueError if not."""
        path = self._path(span)
        with suppress(ValueError, OSError):
            images = read_samples(path).images
            if len(images) == len(span):
                return np.array(images)
        raise ValueError(f"{path} is damaged and counts as missing: the same command draws its images again")

    def drop(self, span: range) -> None:
        """Delete one of ``spans()``: its images are missing from then on."""
        self._path(span).unlink(missing_ok=True)

    def clean(self) -> None:
        """Delete what killed processes were writing, here and for the output itself; no other one may be at work."""
        for path in abandoned(self.folder) + abandoned(self.folder.parent, of=self.folder.stem):
            shutil.rmtree(path)

    def remove(self) -> None:
        """Delete the job and its images; no other process may be at work. What is not ours stays, and its folder."""
        self._forget()
        self.clean()
        for name in Lease.FILES:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _forget(self) -> None:
        """First that there is a job, then its images: without the manifest they are nobody's."""
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
