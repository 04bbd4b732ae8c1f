"""The two sides of a comparison: images of one size, or the statistics of their features."""

import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import READING, Cache, DataConfig
from fastdiff.data import Dataset, UnreadableImage, decode, load_shared, read_samples
from fastdiff.data.loading import folder_of
from fastdiff.data.npz import read_arrays
from fastdiff.evaluation.extractors import INCEPTION, Extractor
from fastdiff.evaluation.metrics import Statistics
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.runtime.files import refuse_unwritable, replacing

_WANTED = "give an npz of images (arr_0), or of statistics (mu and sigma)"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images uint8 (N, H, W, 3), their ``names`` (N,) if they have any, and their origin as values for JSON."""

    images: NDArray[np.uint8]
    names: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Height of the images."""
        return self.images.shape[1]

    def first(self, count: int) -> "ImageSet":
        """The first ``count`` images; ValueError if there are fewer."""
        if count > len(self):
            raise ValueError(f"num_samples {count:,}: {self.about['data']} has {len(self):,} images")
        return replace(self, images=self.images[:count], names=self.names[:count])


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """The statistics of a reference's features, with those of the spatial ones or None, and their origin."""

    features: Statistics
    spatial: Statistics | None
    about: dict[str, Any] = field(default_factory=dict)


def open_images(
    place: Path,
    size: int | None,
    world: World,
    display: Lines,
    config: DataConfig,
    reading: int = READING,
) -> ImageSet:
    """The images of an npz, or of a folder or zip: resized and cropped to ``size`` as training does.

    Without a size those of a folder must be of one size. ``config`` says how a folder is read. The images are
    memory-mapped: those of a folder are decoded once into the file that training uses, too. ValueError if there are
    fewer than two images, or the npz has another size. Collective.
    """
    if place.suffix.lower() == ".npz" and place.is_file():
        found = world.on_all(lambda: _of_npz(place, size))
    else:
        found = _of_folder(replace(config, data_dir=str(place)), size, world, display, reading)
    if len(found) < 2:
        world.refuse(f"{place} has one image: a comparison needs two or more")
    return found


def _of_npz(path: Path, size: int | None) -> ImageSet:
    samples = read_samples(path)
    height, width = samples.images.shape[1:3]
    if height != width:
        raise ValueError(f"{path} holds images of {width}x{height} pixels: they must be square")
    if size not in (None, height):
        raise ValueError(f"{path} holds images of {height} pixels, not {size}: compare images of one size")
    about = {"data": str(path.resolve()), "count": len(samples.images), "crc32": samples.checksum}
    return ImageSet(samples.images, samples.names or (), about)


def _of_folder(config: DataConfig, size: int | None, world: World, display: Lines, reading: int) -> ImageSet:
    assumed = size or world.from_main(lambda: _size_of_first(config))
    config = replace(config, cache=Cache.DISK)
    with warnings.catch_warnings(action="ignore"):  # they are about training on these images
        dataset = load_shared(config, assumed, labelled=False, world=world, display=display, reading=reading)
    smallest, largest = dataset.preflight.smallest, dataset.preflight.largest
    if size is None and smallest != largest:
        sizes = " to ".join(f"{width}x{height}" for width, height in (smallest, largest))
        world.refuse(f"{config.data_dir} has images of {sizes} pixels: give the size to compare at with --image-size")
    return of_dataset(dataset, config.data_dir)


def of_dataset(dataset: Dataset, data_dir: str) -> ImageSet:
    """The images of a data set that is loaded already."""
    about = {"data": str(Path(data_dir).resolve()), "count": len(dataset.images), "fingerprint": dataset.fingerprint}
    return ImageSet(dataset.images, dataset.names, about)


def _size_of_first(config: DataConfig) -> int:
    folder = folder_of(config, 1, labelled=False)
    for file in folder.files:
        try:
            return min(decode(file, folder.decoding).size)
        except UnreadableImage:
            continue
    return 1  # loading says what is wrong with each


def holds_statistics(place: Path) -> bool:
    """Whether a file is an npz with statistics of features, perhaps beside images."""
    try:
        with zipfile.ZipFile(place) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def holds_images(place: Path) -> bool:
    """Whether an npz that holds statistics also holds images, as guided-diffusion's references do."""
    with zipfile.ZipFile(place) as archive:
        return "arr_0.npy" in archive.namelist()


def read_statistics(path: Path, extractor: Extractor) -> ReferenceStatistics:
    """The statistics that save_statistics wrote or guided-diffusion's evaluator, which names no extractor: Inception.

    ValueError if they are damaged, or of another extractor than this one.
    """

    def is_real(*dimensions: int) -> Any:
        return lambda shape, dtype: len(shape) in dimensions and dtype.kind in "fiu"

    def is_text(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
        return shape == () and dtype.kind == "U" and dtype.itemsize <= 2**12

    fits = {name: is_real(1) for name in ("mu", "mu_s")} | {name: is_real(2) for name in ("sigma", "sigma_s")}
    fits |= {"count": is_real(0), "extractor": is_text, "sha256": is_text}
    stored = read_arrays(path, fits, _WANTED)
    name, digest = (str(stored[key]) if key in stored else None for key in ("extractor", "sha256"))
    foreign = name is None and extractor.family != ""  # a file of that name that is not Inception's
    if foreign or (name or INCEPTION) != extractor.name or digest not in (None, extractor.sha256):
        whose = name or f"{INCEPTION}, as those of guided-diffusion's evaluator are"
        same = " with other weights" if (name or INCEPTION) == extractor.name else ""
        raise ValueError(
            f"{path} has the statistics of {whose}{same}, and the extractor is {extractor.name}: choose the same with "
            "--extractor, or give images as the reference"
        )
    count = int(stored.get("count", 0))
    features = _statistics(path, stored, "mu", "sigma", count)
    spatial = _statistics(path, stored, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= stored.keys() else None
    return ReferenceStatistics(features, spatial, {"data": str(path.resolve()), "count": count or None})


def _statistics(path: Path, stored: dict[str, NDArray[Any]], mean: str, covariance: str, count: int) -> Statistics:
    mu, sigma = (np.asarray(stored[name], np.float64) for name in (mean, covariance))
    if sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path} has {mean} of {len(mu)} values and {covariance} of {sigma.shape}: {_WANTED}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path} has statistics that are not finite: compute them again")
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * np.abs(sigma).max(initial=0)):
        raise ValueError(f"{path} has a {covariance} that is not symmetric, so it is no covariance: {_WANTED}")
    return Statistics(mu, (sigma + sigma.T) / 2, count)


def refuse_statistics_file(path: Path) -> None:
    """ValueError unless save_statistics can write ``path``, which must be new."""
    if path.suffix != ".npz":
        raise ValueError(f"save_stats {path} must end in .npz")
    if path.exists():
        raise ValueError(f"save_stats {path} exists: name another file")
    refuse_unwritable("save_stats", path.parent)


def save_statistics(path: Path, features: Statistics, spatial: Statistics | None, extractor: Extractor) -> None:
    """Write the statistics atomically as an npz with guided-diffusion's names, and the extractor's.

    OSError if it cannot be written.
    """
    arrays: dict[str, Any] = {"mu": features.mean, "sigma": features.covariance, "count": features.count}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    with replacing(path) as temporary:
        np.savez(temporary, **arrays, extractor=extractor.name, sha256=extractor.sha256)
