"""Decode a folder of images once, into memory or into a memory-mapped file that later runs reuse."""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import Cache, DataConfig
from fastdiff.data.dataset import ImageFolder
from fastdiff.data.images import DARK, Decoding, File, Loaded, UnreadableImage, load_described
from fastdiff.data.threads import Progress, in_order
from fastdiff.data.zipped import ZipMember
from fastdiff.runtime.files import existing, replacing, sync, unfinished
from fastdiff.runtime.words import printable

MEMORY_SHARE = 0.25
"""Decoded images stay in memory if they take at most this fraction of the available memory."""

_FORMAT = 1  # version of the cache files and of their pixels: change it when decoding changes
_STALE_SECONDS = 3600  # a temporary file not written to for this long was left by a killed run

Keep = Callable[[int, NDArray[np.uint8], tuple[int, int]], Any]
"""Receives the index of an image in its folder, its pixels, and its original (width, height)."""


@dataclass
class Decoded:
    """What decoding a folder yields besides pixels: the unreadable images by reason, least and greatest size.

    ``deep`` is the number of 16-bit images, ``dark`` that of those without a value above images.DARK, and ``peak`` the
    greatest value of the latter.
    """

    unreadable: dict[str, str]
    smallest: tuple[int, int]
    largest: tuple[int, int]
    deep: int = 0
    dark: int = 0
    peak: int = 0


def decode_once(
    folder: ImageFolder, config: DataConfig, on_progress: Progress | None, processes: int
) -> tuple[NDArray[np.uint8], Decoded, NDArray[np.int64]]:
    """The readable images of a folder in order (M, H, W, 3), their Decoded, and the lengths (N,) of all its files.

    The images are in memory or in a file, as config.cache says; ``processes`` is how many processes of this machine
    load them. Raises ValueError if neither can hold them or if no image can be read.
    """
    key, lengths = _key_and_lengths(folder)
    needed = len(folder) * folder.image_size**2 * 3  # bytes
    if _in_memory(config.cache, needed, processes):
        return *_decode_to_memory(folder, on_progress), lengths
    return *_decode_to_disk(folder, key, _cache_dir(config), needed, on_progress), lengths


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _in_memory(cache: Cache, needed: int, processes: int) -> bool:
    if cache is Cache.DISK:
        return False
    available = available_memory() // processes
    if cache is Cache.MEMORY and needed > available:
        raise ValueError(
            f"cache memory: the decoded images take {_gib(needed)} and {_gib(available)} are available; use cache disk"
        )
    return cache is Cache.MEMORY or (processes == 1 and needed <= MEMORY_SHARE * available)


def _decode_to_memory(folder: ImageFolder, on_progress: Progress | None) -> tuple[NDArray[np.uint8], Decoded]:
    images = np.empty((len(folder), folder.image_size, folder.image_size, 3), np.uint8)
    filled = 0

    def keep(_: int, image: NDArray[np.uint8], __: tuple[int, int]) -> None:
        nonlocal filled
        images[filled] = image
        filled += 1

    decoded = decode(folder, keep, on_progress)
    return images[:filled], decoded


def _decode_to_disk(
    folder: ImageFolder, key: str, cache_dir: Path, needed: int, on_progress: Progress | None
) -> tuple[NDArray[np.uint8], Decoded]:
    file, notes = cache_dir / f"{key}.npy", cache_dir / f"{key}.json"
    if (found := _reopen(folder, file, notes)) is not None:
        return found
    with _disk_errors(cache_dir, needed):
        _remove_stale(cache_dir, key)
        with unfinished(file) as temporary:
            with temporary.open("wb") as out:
                _write_header(out, folder, 0)
                decoded = decode(folder, lambda _, image, __: out.write(image.data), on_progress)
                out.seek(0)
                _write_header(out, folder, len(folder) - len(decoded.unreadable))
            sync(temporary)
            # Another machine may have written the same file meanwhile. Keep that one: on NFS, replacing a file breaks
            # the mappings that other machines have of it.
            if (found := _reopen(folder, file, notes)) is not None:
                return found
            # Write the notes first: once the images exist, both files are complete.
            with replacing(notes) as unfinished_notes:
                unfinished_notes.write_text(json.dumps(asdict(decoded)))
            temporary.replace(file)
    return np.load(file, mmap_mode="r"), decoded


def decode(folder: ImageFolder, keep: Keep, on_progress: Progress | None) -> Decoded:
    """Pass every readable image to ``keep``, in order. Raises ValueError if there is none."""

    def attempt(file: File) -> Loaded | UnreadableImage:
        try:
            return load_described(file, folder.image_size, folder.decoding)
        except UnreadableImage as error:
            return error

    unreadable: dict[str, str] = {}
    smallest = largest = None
    peaks: list[int] = []
    # Pillow warns about odd metadata and the like. Threads share the warning filters: set them once, around them all.
    with warnings.catch_warnings(), closing(in_order(attempt, folder.files)) as results:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for i, (name, result) in enumerate(zip(folder.names, results, strict=True)):
            if isinstance(result, UnreadableImage):
                unreadable[name] = result.reason
            else:
                keep(i, result.pixels, result.size)
                smallest = min(smallest or result.size, result.size, key=math.prod)
                largest = max(largest or result.size, result.size, key=math.prod)
                if result.peak is not None:
                    peaks.append(result.peak)
            if on_progress is not None:
                on_progress(i + 1, len(folder))
    if smallest is None or largest is None:
        name, reason = next(iter(unreadable.items()))
        raise ValueError(
            f"none of the {len(folder):,} images in {folder.root} can be read; "
            f"the first is {printable(name)} ({reason})"
        )
    dark = [peak for peak in peaks if peak <= DARK]
    return Decoded(unreadable, smallest, largest, len(peaks), len(dark), max(dark, default=0))


def _reopen(folder: ImageFolder, file: Path, notes: Path) -> tuple[NDArray[np.uint8], Decoded] | None:
    """The images and notes that an earlier run stored, or None if they are missing or incomplete."""
    try:
        found = json.loads(notes.read_text())
        sizes = {name: tuple(found[name]) for name in ("smallest", "largest")}
        decoded = Decoded(**{**found, **sizes})
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    expected = (len(folder) - len(decoded.unreadable), folder.image_size, folder.image_size, 3)
    return (images, decoded) if images.shape == expected and images.dtype == np.uint8 else None


def _key_and_lengths(folder: ImageFolder) -> tuple[str, NDArray[np.int64]]:
    """The cache file's name, and the length of every image file in bytes, from one pass over their metadata.

    The name is a hash of everything that may change a pixel: each file's name, length, times and inode, and how files
    are decoded.
    """
    how = "" if folder.decoding == Decoding(reading=1) else f" {folder.decoding}"
    digest = hashlib.sha256(f"{_FORMAT} {folder.image_size}{how}\n".encode())
    lengths = np.zeros(len(folder), np.int64)
    for i, (name, file) in enumerate(zip(folder.names, folder.files, strict=True)):
        lengths[i], state = _state(file)
        digest.update(os.fsencode(name) + f"\0{state}\n".encode())
    return digest.hexdigest(), lengths


def _state(file: Path | ZipMember) -> tuple[int, str]:
    """The length of a file, and a string that changes with its content."""
    if isinstance(file, ZipMember):
        return file.info.file_size, f"{file.info.file_size} {file.info.CRC:08x}"
    try:
        stat = file.stat()
    except OSError:  # deleted meanwhile; decoding reports it
        return 0, "missing"
    return stat.st_size, f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(os.path.expanduser(config.cache_dir))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"


@contextmanager
def _disk_errors(cache_dir: Path, needed: int) -> Iterator[None]:
    remedy = f"it needs {_gib(needed)} for decoded images; choose another folder as cache_dir"
    try:
        free = shutil.disk_usage(existing(cache_dir)).free
        if free < needed:
            raise ValueError(f"cache_dir {cache_dir} has {_gib(free)} free, {remedy}")
        yield
    except OSError as error:
        raise ValueError(f"cache_dir {cache_dir} cannot be written ({error.strerror}), {remedy}") from error


def _remove_stale(cache_dir: Path, key: str) -> None:
    for left in cache_dir.glob(f"*{key}.*.tmp"):  # a hidden folder, or a file of an earlier version
        with suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - max(path.stat().st_mtime for path in (left, *left.glob("*"))) > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def _write_header(out: Any, folder: ImageFolder, n: int) -> None:
    """Write the .npy header. NumPy leaves room for the first dimension to grow, so the header's length is constant."""
    shape = (n, folder.image_size, folder.image_size, 3)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"
