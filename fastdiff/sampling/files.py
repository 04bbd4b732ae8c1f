"""The files that a job writes: checked before any work, assembled from the shards at its end."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastdiff.data.classes import file_name_of
from fastdiff.runtime.files import abandoned, refuse_unwritable
from fastdiff.sampling.loop import Int64Array
from fastdiff.sampling.output import Uint8Array, save_npz, save_pngs
from fastdiff.sampling.shards import Shards, parts_of

GRID_IMAGES = 100
"""The preview grid shows this many images, the first ones of the npz."""

FRAMES = {".gif": 60, ".png": 12}
"""Maximum number of frames of a trajectory, as an animation and as a strip."""

LONGEST_NAME = 200
"""Maximum bytes of a file name; temporary names add a few."""


@dataclass(frozen=True)
class SampleFiles:
    """The output paths: the npz, with a preview grid and temporary shards beside it; PNGs and a trajectory.

    ``option`` is the flag that named the npz. If it is "", its settings did: then a grid that is there may be replaced.
    """

    out: Path
    png_dir: Path | None = None
    trajectory: Path | None = None
    overwrite: bool = False
    trajectory_images: int = 1
    option: str = "--out"

    @property
    def grid(self) -> Path:
        """The preview grid beside the npz."""
        return self.out.with_suffix(".png")

    @property
    def shards(self) -> Shards:
        """The finished images."""
        return Shards(parts_of(self.out), self.option)

    @property
    def manifest(self) -> dict[str, str | None]:
        """The optional outputs of the job. A resumed job must have the same ones, so that each ends complete."""
        named = {"png_dir": self.png_dir, "trajectory": self.trajectory}
        return {name: None if path is None else str(path.resolve()) for name, path in named.items()}

    @property
    def again(self) -> str:
        """What resumes an unfinished job, for messages."""
        return "the same command without --overwrite" if self.overwrite else "the same command"

    def check(self) -> None:
        """ValueError if a path is unsuitable or not writable, or exists without being an unfinished job's."""
        if self.out.suffix != ".npz":
            raise ValueError(f"out {self.out} must end in .npz")
        if self.trajectory is not None and self.trajectory.suffix not in FRAMES:
            raise ValueError(f"trajectory {self.trajectory} must end in .gif (an animation) or .png (a strip)")
        if self.trajectory is not None and self.trajectory.resolve() == self.grid.resolve():
            raise ValueError(f"trajectory {self.trajectory} is the name of the grid: name another file")
        for option, path in (("out", self.out), ("out", self.grid), ("trajectory", self.trajectory)):
            if path is not None:
                self._check_file(option, path)
        if self.png_dir is not None:
            if self.png_dir.resolve() in (self.out.resolve(), self.grid.resolve()):
                raise ValueError(f"png_dir {self.png_dir} is the name of another file that is written: name a folder")
            if self.png_dir.is_dir() and any(self.png_dir.glob("*.png")) and not self._ours("png_dir"):
                raise ValueError(f"png_dir {self.png_dir} holds PNG files: name another folder, or use --overwrite")
            refuse_unwritable("png_dir", self.png_dir)

    def _check_file(self, option: str, path: Path) -> None:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise ValueError(f"{option} {path.name[:40]}... is too long: a name may have {LONGEST_NAME} bytes")
        if path.is_dir():
            raise ValueError(f"{option} {path} is a folder: name a file")
        if path.exists() and not self._ours(option):
            raise ValueError(f"{path} exists: name another file with --{option}, or use --overwrite")
        refuse_unwritable(option, path.parent)

    def _ours(self, option: str) -> bool:
        """Whether an existing file may be replaced: with --overwrite, or if a job with these settings made it."""
        if self.overwrite or not self.option:
            return True
        unfinished = self.shards.settings()
        return unfinished is not None and unfinished.get(option) == self.manifest.get(option)

    def clean(self) -> None:
        """Delete the temporary files of killed processes; no other process may be writing these files."""
        self.shards.clean()
        left = [] if self.png_dir is None else abandoned(self.png_dir)
        for path in (self.grid, self.trajectory):
            if path is not None:
                left += abandoned(path.parent, of=path.name)
        for folder in left:
            shutil.rmtree(folder)

    def keep(self, positions: Int64Array, images: Uint8Array, names: list[str]) -> None:
        """Save finished images (n, H, W, 3) at the increasing ``positions`` (n,); OSError if that fails."""
        if self.png_dir is not None:
            save_pngs(self.png_dir, images, names)
        cuts = np.flatnonzero(np.diff(positions) != 1) + 1  # positions in the gaps were drawn earlier
        for part, kept in zip(np.split(positions, cuts), np.split(images, cuts), strict=True):
            self.shards.add(int(part[0]), kept)

    def join(
        self,
        image_size: int,
        indices: Int64Array,
        labels: Int64Array | None,
        class_names: tuple[str, ...],
        settings: Mapping[str, Any],
    ) -> Uint8Array:
        """Write the npz from the shards, one in memory at a time; return the first GRID_IMAGES images.

        The npz holds arr_0, for class-conditional models arr_1 and class_names, the image numbers as indices, the seed
        and the settings (JSON). ValueError if a shard is damaged or images are missing.
        """
        spans = self.shards.spans()
        first: list[Uint8Array] = []

        def parts() -> Iterator[Uint8Array]:
            for span in spans:
                try:
                    images = self.shards.read(span)
                except ValueError:
                    self.shards.drop(span)
                    raise
                if span.start < GRID_IMAGES:
                    first.append(images[: GRID_IMAGES - span.start])
                yield images

        if (there := sum(map(len, spans))) != len(indices):
            raise ValueError(
                f"{self.shards.folder} holds {there} of {len(indices)} images: every process must write to the same "
                "folder; the same command draws what is missing"
            )
        shape = (len(indices), image_size, image_size, 3)
        more: dict[str, ArrayLike] = {}
        if labels is not None:
            more = {"arr_1": labels.astype(np.int64), "class_names": np.array(class_names, np.str_)}
        about = {"seed": np.array(settings["seed"], dtype=np.uint64), "settings": np.array(json.dumps(settings))}
        save_npz(self.out, parts(), shape, **more, indices=indices, **about)
        return np.concatenate(first)


def png_names(indices: Int64Array, labels: Int64Array | None, class_names: tuple[str, ...]) -> list[str]:
    """File names that start with the class, so that fastdiff can train on the folder.

    With --labels prefix the folder has the classes ``class_names`` again, whatever characters they contain. ValueError
    if a class name is too long for a file name.
    """
    if labels is None:
        return [f"{i:06d}" for i in indices]
    beginnings = [file_name_of(name) for name in class_names]
    longest = max(beginnings, key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > LONGEST_NAME:
        raise ValueError(
            f"png_dir: the class {longest[:40]}... is too long for the name of a file: leave --png-dir out"
        )
    return [f"{beginnings[label]}_{i:06d}" for i, label in zip(indices, labels, strict=True)]
