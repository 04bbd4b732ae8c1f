"""The two sides of a comparison: images of one size, or the statistics of their features."""

import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.checkpoint import sha256
from fastdiff.config import READING, Cache, DataConfig
from fastdiff.data import Dataset, UnreadableImage, decode, load_shared, read_samples
from fastdiff.data.loading import folder_of
from fastdiff.data.npz import read_arrays
from fastdiff.evaluation.extractors import INCEPTION, KNOWN, Extractor
from fastdiff.evaluation.metrics import Statistics
from fastdiff.evaluation.resizing import resized_like_pillow
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.runtime.files import refuse_unwritable, replacing

_WANTED = "name images (an npz, a folder or a zip), or for a reference an npz of statistics (mu and sigma)"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images: the ``rows`` (N,) of uint8 (M, H, H, 3), or all of them; ``names`` (M,) may be empty.

    ``about`` is their origin as values for JSON, ``told`` a phrase about what was found and left out. Images of another
    height than ``size`` are resized as they are read; 0 stands for their own.
    """

    images: NDArray[np.uint8]
    names: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    rows: NDArray[np.int64] | None = None
    told: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.size or self.images.shape[1])

    def __len__(self) -> int:
        return len(self.images) if self.rows is None else len(self.rows)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The images ``start`` to ``stop - 1`` as a copy in memory, (n, size, size, 3)."""
        found = np.array(self.images[start:stop] if self.rows is None else self.images[self.rows[start:stop]])
        if found.shape[1] == self.size:
            return found
        levels = resized_like_pillow(torch.from_numpy(found).permute(0, 3, 1, 2), self.size)
        return levels.permute(0, 2, 3, 1).to(torch.uint8).numpy()

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        """The image with this number, (size, size, 3)."""
        return self.read(number, number + 1)[0]

    def name(self, number: int, otherwise: str) -> str:
        """The name of the image with this number, ``otherwise`` with the number if it has none."""
        return self.names[number if self.rows is None else self.rows[number]] if self.names else f"{otherwise} {number}"

    def only(self, rows: NDArray[np.int64], **about: Any) -> "ImageSet":
        """These images alone, rows (n,) of all; ``about`` is added to their origin."""
        return replace(self, rows=rows, about={**self.about, "count": len(rows), **about})

    def first(self, count: int) -> "ImageSet":
        """The first ``count`` images; ValueError if there are fewer."""
        if count > len(self):
            raise ValueError(f"num_samples {count:,}: {self.about['data']} has {len(self):,} images")
        return self.only(np.arange(count)) if count < len(self) else self


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """The statistics of a reference's features, with those of the spatial ones or None, and their origin.

    ``size`` is the height of its images if it is known, and ``images`` some of them if the file has them.
    """

    features: Statistics
    spatial: Statistics | None
    about: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    images: ImageSet | None = None


def refuse_missing(place: Path) -> None:
    """ValueError if there is nothing at ``place``."""
    if not place.exists():
        raise ValueError(f"{place} does not exist: {_WANTED}")


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
    fewer than two images, the npz has another size, or the processes see different images. Collective.
    """

    def is_npz() -> bool:
        refuse_missing(place)
        return place.suffix.lower() == ".npz" and place.is_file()

    if world.from_main(is_npz):
        found = world.on_all(lambda: _of_npz(place, size))
        checksums = world.all_gather_object(found.about["crc32"])
        if len(set(checksums)) > 1:
            world.refuse(f"{place}: the processes see different images; every machine needs the same file")
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
    about = {"data": str(path.resolve()), "count": len(samples.images), "size": height, "crc32": samples.checksum}
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
    return of_dataset(dataset, config.data_dir, assumed)


def of_dataset(dataset: Dataset, data_dir: str, size: int) -> ImageSet:
    """The images of a data set at ``size``."""
    about = {"data": str(Path(data_dir).resolve()), "count": len(dataset.images), "size": size}
    about["fingerprint"] = dataset.fingerprint
    return ImageSet(dataset.images, dataset.names, about, told=f"{dataset.preflight.line()}, ", size=size)


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


def read_statistics(path: Path, extractor: Extractor, device: torch.device, size: int | None) -> ReferenceStatistics:
    """The statistics that save_statistics wrote or guided-diffusion's evaluator, which names no extractor: Inception.

    ValueError if they are damaged, or of another extractor than this one, or of images of another size than ``size``.
    """

    def is_real(*dimensions: int) -> Any:
        return lambda shape, dtype: len(shape) in dimensions and dtype.kind in "fiu"

    def is_count(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
        return shape == () and dtype.kind in "iu"

    def is_text(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
        return shape == () and dtype.kind == "U" and dtype.itemsize <= 2**12

    fits = {name: is_real(1) for name in ("mu", "mu_s")} | {name: is_real(2) for name in ("sigma", "sigma_s")}
    fits |= {"count": is_count, "image_size": is_count, "extractor": is_text, "sha256": is_text}
    stored = read_arrays(path, fits, _WANTED)
    name, digest = (str(stored[key]) if key in stored else None for key in ("extractor", "sha256"))
    digests = {digest for digest, known in KNOWN.items() if known == extractor.name} | {extractor.sha256, None}
    foreign = name is None and extractor.family != ""  # a file of that name that is not Inception's
    if foreign or (name or INCEPTION) != extractor.name or digest not in digests:
        whose = name or f"{INCEPTION}, as those of guided-diffusion's evaluator are"
        same = " with other weights" if (name or INCEPTION) == extractor.name else ""
        raise ValueError(
            f"{path} has the statistics of {whose}{same}, and the extractor is {extractor.name}: choose the same with "
            "--extractor, or give images as the reference"
        )
    count, their_size = (int(stored.get(key, 0)) for key in ("count", "image_size"))
    if min(count, their_size) < 0:
        raise ValueError(f"{path} has a count or an image_size below 0: compute the statistics again")
    if size and their_size and size != their_size:
        raise ValueError(f"{path} has the statistics of images of {their_size} pixels, not {size}: compare one size")
    features = _statistics(path, stored, "mu", "sigma", count)
    spatial = _statistics(path, stored, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= stored.keys() else None
    for known, expected in zip((features, spatial), extractor.sizes(device), strict=True):
        if known is not None and expected and len(known.mean) != expected:
            raise ValueError(
                f"{path} has statistics of {len(known.mean)} features, and {extractor.name} has {expected}: compute "
                "them with this extractor"
            )
    about = {"data": str(path.resolve()), "count": count or None, "sha256": sha256(path)}
    return ReferenceStatistics(
        features, spatial, about | ({"size": their_size} if their_size else {}), their_size or None
    )


def _statistics(path: Path, stored: dict[str, NDArray[Any]], mean: str, covariance: str, count: int) -> Statistics:
    mu, sigma = (np.asarray(stored[name], np.float64) for name in (mean, covariance))
    if sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path} has {mean} of {len(mu)} values and {covariance} of {sigma.shape}: {_WANTED}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path} has statistics that are not finite: compute them again")
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * np.abs(sigma).max(initial=0)):
        raise ValueError(f"{path} has a {covariance} that is not symmetric, so it is no covariance: {_WANTED}")
    sigma = (sigma + sigma.T) / 2
    values = np.linalg.eigvalsh(sigma)
    if values[0] < -1e-4 * max(values[-1], 0):
        raise ValueError(f"{path} has a {covariance} with negative eigenvalues, so it is no covariance: {_WANTED}")
    return Statistics(mu, sigma, count)


def refuse_statistics_file(path: Path) -> None:
    """ValueError unless save_statistics can write ``path``, which must be new."""
    if path.suffix != ".npz":
        raise ValueError(f"save_stats {path} must end in .npz")
    if path.exists():
        raise ValueError(f"save_stats {path} exists: name another file")
    refuse_unwritable("save_stats", path.parent)


def save_statistics(
    path: Path, features: Statistics, spatial: Statistics | None, extractor: Extractor, size: int | None
) -> None:
    """Write the statistics atomically as an npz with guided-diffusion's names, the extractor and the images' ``size``.

    OSError if it cannot be written.
    """
    arrays: dict[str, Any] = {"mu": features.mean, "sigma": features.covariance, "count": features.count}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if size is not None:
        arrays["image_size"] = size
    with replacing(path) as temporary:
        np.savez(temporary, **arrays, extractor=extractor.name, sha256=extractor.sha256)
