"""Extracts the features of images into memory-mapped files, with one process or many."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from fastdiff.evaluation.extractors import Extractor
from fastdiff.evaluation.image_sets import ImageSet
from fastdiff.evaluation.metrics import Features
from fastdiff.runtime.distributed import World
from fastdiff.runtime.words import duration

BATCH = 64
"""Images in one call of an extractor."""

_ROWS = 4096  # copied at a time when the processes' parts are joined

OnProgress = Callable[[int, int, str], None]
"""Called with the number of images done, their total, and the speed as text."""


@dataclass(frozen=True, eq=False)
class Extraction:
    """Features (N, D) of N images, memory-mapped, and what else their extractor gives: see Extracted."""

    features: Features
    spatial: Features | None = None
    probabilities: Features | None = None


def extract(
    images: ImageSet,
    extractor: Extractor,
    folder: Path,
    device: torch.device,
    world: World,
    on_progress: OnProgress,
    more: Collection[str] = ("spatial", "probabilities"),
) -> Extraction | None:
    """Extract the features of all images into files of ``folder``, which every process sees; None but on rank 0.

    ``more`` are fields of Extracted to extract, too, if there are any. Every process extracts a share of the images.
    ValueError, on all of them, if a feature is not finite. Collective.
    """
    count = len(images)
    first, last = (count * rank // world.size for rank in (world.rank, world.rank + 1))
    world.on_all(
        lambda: _extract(images, extractor, folder, device, world, first, last, on_progress, ("features", *more))
    )

    def joined(name: str) -> Features | None:
        # of more processes than images some have none
        parts = [path for rank in range(world.size) if (path := _part(folder, name, rank)).exists()]
        if len(parts) < 2:
            return np.load(parts[0], mmap_mode="r") if parts else None
        whole, done = None, 0
        for path in parts:
            part = np.load(path, mmap_mode="r")
            if whole is None:
                whole = open_memmap(folder / f"{name}.npy", "w+", np.float32, (count, part.shape[1]))
            for start in range(0, len(part), _ROWS):
                rows = part[start : start + _ROWS]
                whole[done : done + len(rows)] = rows
                done += len(rows)
            path.unlink()
        return whole

    def gathered() -> Extraction | None:
        if not world.main:
            return None
        features = joined("features")
        assert features is not None
        return Extraction(features, joined("spatial"), joined("probabilities"))

    return world.on_all(gathered)


def _extract(
    images: ImageSet,
    extractor: Extractor,
    folder: Path,
    device: torch.device,
    world: World,
    first: int,
    last: int,
    on_progress: OnProgress,
    wanted: Collection[str],
) -> None:
    """Extract the images ``first`` to ``last - 1`` into this process's files."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: not every process sees this folder: the results must be in one that all see")
    files: dict[str, Features] = {}
    began, total = time.perf_counter(), len(images)
    for start in range(first, last, BATCH):
        stop = min(start + BATCH, last)
        batch = torch.from_numpy(images.read(start, stop)).to(device).permute(0, 3, 1, 2)  # (N, 3, H, W)
        found = extractor(batch)
        for name in wanted:
            value: Tensor | None = getattr(found, name)
            if value is not None:
                if name not in files:
                    path = _part(folder, name, world.rank)
                    files[name] = open_memmap(path, "w+", np.float32, (last - first, value.shape[1]))
                files[name][start - first : stop - first] = value.cpu().numpy()
        done = total if stop == last else (stop - first) * world.size  # as if the others were equally far
        rate = done / (time.perf_counter() - began)
        on_progress(done, total, f"{duration((total - done) / rate)} left  {rate:.1f} images/s")
    for file in files.values():
        file.flush()  # type: ignore[attr-defined]  # open_memmap gives a memmap


def _part(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}.{rank}.npy"
