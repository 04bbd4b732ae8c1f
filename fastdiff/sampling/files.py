"""The files that a job writes: checked before any work, filled from the shards at its end."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.sampling.classes import file_name_of
from fastdiff.sampling.generate import Int64Array, Uint8Array
from fastdiff.sampling.output import save_npz, save_pngs
from fastdiff.sampling.shards import Shards, parts_of

GRID_IMAGES = 100
"""The grid beside the npz shows the first of them."""


FRAMES = {".gif": 60, ".png": 12}
"""At most so many steps of a trajectory are shown, as an animation and as a strip."""


@dataclass(frozen=True)
class Files:
    """Where the images go: the npz, with a grid beside it and shards while it is unfinished; PNGs and a trajectory."""

    out: Path
    png_dir: Path | None = None
    trajectory: Path | None = None
    overwrite: bool = False

    @property
    def grid(self) -> Path:
        """The picture beside the npz."""
        return self.out.with_suffix(".png")

    @property
    def shards(self) -> Shards:
        """The images that are finished."""
        return Shards(parts_of(self.out))

    def check(self) -> None:
        """ValueError where a file is in the way, other than an unfinished job's, or cannot be written."""
        if self.out.suffix != ".npz":
            raise ValueError(f"out {self.out} must end in .npz")
        if self.trajectory is not None and self.trajectory.suffix not in FRAMES:
            raise ValueError(f"trajectory {self.trajectory} must end in .gif (an animation) or .png (a strip)")
        if self.trajectory == self.grid:
            raise ValueError(f"trajectory {self.trajectory} is the name of the grid: name another file")
        mine = self.overwrite or self.shards.settings() is not None
        for option, path in (("out", self.out), ("out", self.grid), ("trajectory", self.trajectory)):
            if path is None:
                continue
            if path.is_dir():
                raise ValueError(f"{option} {path} is a folder: name a file")
            if path.exists() and not mine:
                raise ValueError(f"{path} exists: name another file with --{option}, or use --overwrite")
            _check_folder(option, path.parent)
        if self.png_dir is not None:
            if not mine and self.png_dir.is_dir() and any(self.png_dir.glob("*.png")):
                raise ValueError(f"png_dir {self.png_dir} holds PNG files: name another folder, or use --overwrite")
            _check_folder("png_dir", self.png_dir)

    def keep(self, positions: Int64Array, images: Uint8Array, names: list[str]) -> None:
        """Keep finished images (n, H, W, 3), those of the increasing positions (n,); OSError where that fails."""
        if self.png_dir is not None:
            save_pngs(self.png_dir, images, names)
        cuts = np.flatnonzero(np.diff(positions) != 1) + 1  # what lies between was drawn before
        for part, kept in zip(np.split(positions, cuts), np.split(images, cuts), strict=True):
            self.shards.add(int(part[0]), kept)

    def join(
        self, image_size: int, indices: Int64Array, labels: Int64Array | None, settings: Mapping[str, Any]
    ) -> Uint8Array:
        """Write the npz from the shards, of which one at a time is in memory; returns the first GRID_IMAGES images.

        Beside arr_0, and arr_1 where there are classes, it holds the images' numbers, the seed and the settings (JSON).
        """
        spans = self.shards.spans()
        first: list[Uint8Array] = []

        def parts() -> Iterator[Uint8Array]:
            for span in spans:
                images = self.shards.read(span)
                if span.start < GRID_IMAGES:
                    first.append(images[: GRID_IMAGES - span.start])
                yield images

        if (there := sum(map(len, spans))) != len(indices):
            raise ValueError(
                f"{self.shards.folder} holds {there} of {len(indices)} images: every process must write to the same "
                "folder; the same command draws what is missing"
            )
        shape = (len(indices), image_size, image_size, 3)
        more = {} if labels is None else {"arr_1": labels.astype(np.int64)}
        about = {"seed": np.array(settings["seed"], dtype=np.uint64), "settings": np.array(json.dumps(settings))}
        save_npz(self.out, parts(), shape, **more, indices=indices, **about)
        return np.concatenate(first)


def png_names(indices: Int64Array, labels: Int64Array | None, class_names: tuple[str, ...]) -> list[str]:
    """File names that begin with the class, so that the folder can be trained on as it is."""
    if labels is None or not class_names:
        return [f"{i:06d}" for i in indices]
    names = {i: file_name_of(name) for i, name in enumerate(class_names)}
    return [f"{names.get(int(label), label)}_{i:06d}" for i, label in zip(indices, labels, strict=True)]


def _check_folder(name: str, wanted: Path) -> None:
    """ValueError where the folder is not there and cannot be made, or may not be written to."""
    folder = wanted
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {wanted} cannot be written: {folder} is not a folder that you may write to")
