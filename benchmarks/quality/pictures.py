"""The data sets that recipes are compared on: real images from scikit-learn and scikit-image, always the same ones.

Each has three folders of PNGs, whose names begin with the class: ``train`` is what models learn, ``reference`` what
their samples are compared with, ``held_out`` what no model learns.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdiff.config import PictureSet
from fastdiff.runtime.files import unfinished

Uint8Array = NDArray[np.uint8]
Parts = Mapping[str, Iterator[tuple[str, Uint8Array]]]
"""By the name of a part: the file names, without suffix, and the images (H, W, 3)."""

PARTS = ("train", "reference", "held_out")
PACKAGES = "pip install scikit-learn scikit-image (extra 'quality')"

HELD_OUT_DIGITS = 300
CROPS = {"train": 250, "reference": 500, "held_out": 500}
"""Crops of each photograph."""

_LEFT = 0.5
"""The share of a photograph's width, on its left, from which the crops of train and reference are. Those of held_out
are from the rest."""

_SMALLEST = 0.4
"""The smallest side of a crop, as a share of the largest that its region holds."""


@dataclass(frozen=True)
class Source:
    """A data set: the size of its images, and what makes its parts."""

    name: str
    size: int
    judge_learns: str
    """The part on which the judge is trained; it is checked on the other one of train and held_out."""
    make: Callable[[], Parts]
    judge_updates: int
    flips: bool = False
    """Whether a mirrored image is one of the set, too."""

    @property
    def judge_checked_on(self) -> str:
        """The part on which the judge must be right; it has not learned these images."""
        return "train" if self.judge_learns == "held_out" else "held_out"


def _digits() -> Parts:
    """scikit-learn's 1,797 digits, 8 pixels enlarged to 32. The reference is all of them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(f"the digits are scikit-learn's, which is not installed: {PACKAGES}") from None
    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    parts = {"train": order[HELD_OUT_DIGITS:], "held_out": order[:HELD_OUT_DIGITS], "reference": order}

    def images(rows: NDArray[np.int64]) -> Iterator[tuple[str, Uint8Array]]:
        for row in np.sort(rows):
            small = Image.fromarray((found.images[row] * 255 / 16).astype(np.uint8))
            large = small.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
            yield f"{found.target[row]}_{row:04d}", np.asarray(large)

    return {part: images(rows) for part, rows in parts.items()}


def _photographs() -> Parts:
    """Crops of four photographs at 64 pixels, one class each."""
    try:
        from skimage.data import chelsea, coffee
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ValueError(
            f"the photographs are scikit-learn's and scikit-image's, and {error.name} is not installed: {PACKAGES}"
        ) from None
    photos = {"chelsea": chelsea(), "china": load_sample_image("china.jpg")}
    photos |= {"coffee": coffee(), "flower": load_sample_image("flower.jpg")}
    return crops_of({name: np.asarray(photo, np.uint8) for name, photo in photos.items()}, 64, CROPS)


def crops_of(photos: Mapping[str, Uint8Array], size: int, counts: Mapping[str, int]) -> Parts:
    """So many crops of each photograph (H, W, 3) for each part, resized to ``size``.

    Those of held_out share no pixel with the others: they are from the right of the photographs, the others from the
    left.
    """

    def images(part: str, count: int) -> Iterator[tuple[str, Uint8Array]]:
        for photo, pixels in photos.items():
            border = round(_LEFT * pixels.shape[1])
            region = pixels[:, border:] if part == "held_out" else pixels[:, :border]
            seed = hashlib.sha256(f"{part} {photo}".encode()).digest()
            random = np.random.default_rng(list(seed))
            largest = min(region.shape[:2])
            for number in range(count):
                side = int(random.integers(round(_SMALLEST * largest), largest + 1))
                y, x = (int(random.integers(length - side + 1)) for length in region.shape[:2])
                crop = Image.fromarray(region[y : y + side, x : x + side])
                yield f"{photo}_{number:04d}", np.asarray(crop.resize((size, size), Image.Resampling.LANCZOS))

    return {part: images(part, count) for part, count in counts.items()}


SOURCES = {
    PictureSet.DIGITS: Source("digits", 32, "train", _digits, 1000),
    PictureSet.PHOTOGRAPHS: Source("photographs", 64, "held_out", _photographs, 600, flips=True),
}


def write_pictures(source: Source, folder: Path) -> None:
    """Write the parts that are missing as folders of ``folder``; ValueError if a package is not installed."""
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    parts = source.make() if missing else {}
    for part in missing:
        with unfinished(folder / part) as temporary:
            temporary.mkdir()
            for name, pixels in parts[part]:
                Image.fromarray(pixels).save(temporary / f"{name}.png")
            try:
                os.rename(temporary, folder / part)
            except OSError:
                if not (folder / part).is_dir():  # else another process was faster
                    raise


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a part, uint8 (N, H, W, 3), with the class of each as an index of ``class_names``, int64 (N,)."""

    images: Uint8Array
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """A SHA-256 of all pixels and classes."""
        names = ",".join(self.class_names).encode()
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes() + names).hexdigest()


def read_pictures(folder: Path) -> Pictures:
    """The images of a part's folder, by name."""
    paths = sorted(folder.glob("*.png"))
    classes = [path.name.partition("_")[0] for path in paths]
    class_names, labels = np.unique(classes, return_inverse=True)
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return Pictures(np.stack(images), labels.astype(np.int64), tuple(map(str, class_names)))
