"""The files that samples are kept in: npz as the ADM evaluator reads it, a grid to look at, single PNGs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdiff.checkpoint import replacing

Uint8Array = NDArray[np.uint8]


def save_npz(path: Path, images: Uint8Array, labels: NDArray[np.int64] | None = None) -> None:
    """arr_0: images uint8 (N, H, W, 3); arr_1: labels int64 (N,) where there are any."""
    arrays = [images] if labels is None else [images, labels]
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, *arrays)


def make_grid(images: Uint8Array, columns: int | None = None, gap: int = 2) -> Uint8Array:
    """Images (N, H, W, 3) side by side on white, row by row: uint8 (rows, columns, 3). Square unless told otherwise."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_grid(path: Path, images: Uint8Array, columns: int | None = None) -> None:
    """A PNG of make_grid, small images enlarged by a whole factor to be seen well."""
    grid = make_grid(images, columns)
    factor = max(1, min(4, 800 // max(grid.shape[:2])))
    save_png(path, grid.repeat(factor, axis=0).repeat(factor, axis=1))


def save_pngs(folder: Path, images: Uint8Array, names: Sequence[str]) -> None:
    """Each image as folder/name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images, strict=True):
        save_png(folder / f"{name}.png", image)


def save_png(path: Path, image: Uint8Array) -> None:
    """One image (H, W, 3) as a PNG file, whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")
