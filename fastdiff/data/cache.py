"""A folder of images decoded once, into memory or a memory-mapped file that later runs find again."""

import hashlib
import json
import math
import mmap
import os
import shutil
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import compress, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import Cache, DataConfig
from fastdiff.data.dataset import ImageFolder, LeftOut, Preflight, extension_counts, printable
from fastdiff.data.images import UnreadableImage, load_with_size

MEMORY_SHARE = 0.25
"""Decoded images stay in memory if they take at most this share of what is available."""

_FORMAT = 1  # of the cache files, and of the pixels in them: change it when decoding changes
_STALE_SECONDS = 3600  # a temporary file that nobody has written to for so long belongs to a killed run

Progress = Callable[[int, int], None]
_Loaded = tuple[NDArray[np.uint8], tuple[int, int]] | UnreadableImage


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images uint8 (N, H, W, 3), in memory or mapped read-only, with labels int64 (N,) or None.

    ``names`` are those of the N images below the data folder, ``fingerprint`` 64 hex digits of what the folder holds:
    the names and lengths in bytes of the N images, the class of each, and the classes. It stays the same for a copy of
    the folder, for other times of its files and for another image_size, and it does not see what is left out, nor a
    file of the same length with other bytes.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    preflight: Preflight
    names: tuple[str, ...]
    fingerprint: str

    def check(self) -> None:
        """OSError where the mapped file has become shorter: reading its end would kill the process (SIGBUS)."""
        file: Any = self.images.base  # the mapping keeps its file open
        if isinstance(self.images, np.memmap) and isinstance(file, mmap.mmap):
            missing = self.images.offset + self.images.nbytes - file.size()
            if missing > 0:
                raise OSError(
                    f"{self.images.filename}, the decoded images, has lost {missing:,} bytes while in use; "
                    "start again with --resume, which decodes them anew"
                )


@dataclass
class _Decoded:
    """What decoding a folder found out besides the pixels."""

    unreadable: dict[str, str]
    smallest: tuple[int, int]
    largest: tuple[int, int]


def load_dataset(
    config: DataConfig,
    image_size: int,
    *,
    labelled: bool,
    on_progress: Progress | None = None,
    processes: int = 1,
) -> Dataset:
    """Every readable image of config.data_dir at image_size, in the folder's order.

    Unreadable images are left out and named in the preflight. ``on_progress(done, total)`` is called after each image
    that is decoded, in the caller's thread. Where several ``processes`` of this machine load the folder, cache auto
    takes the file, which they map all at once, and cache memory gives each a copy of its own: let one of them load the
    folder first, and the others find its file.

    Raises ValueError for a folder without images that can be read, for unreadable images if config.strict, and where
    neither the memory nor the disk can hold the decoded images.
    """
    folder = ImageFolder(config.data_dir, image_size, config.labels if labelled else None)
    key, lengths = _key_and_lengths(folder)
    if _in_memory(config.cache, len(folder) * _image_bytes(image_size), processes):
        images, decoded = _decode_to_memory(folder, on_progress)
    else:
        images, decoded = _decode_to_disk(folder, key, _cache_dir(config), on_progress)
    if decoded.unreadable and config.strict:
        name, reason = next(iter(decoded.unreadable.items()))
        raise ValueError(
            f"strict: {len(decoded.unreadable):,} of {len(folder):,} images in {folder.root} cannot be read, the first "
            f"is {printable(name)} ({reason}); mend or remove them, or leave strict off to skip them"
        )
    readable = np.array([name not in decoded.unreadable for name in folder.names])
    names = tuple(compress(folder.names, readable))
    unreadable = [LeftOut(name, reason) for name, reason in decoded.unreadable.items()]
    preflight = Preflight(
        extension_counts(names),
        folder.class_names,
        decoded.smallest,
        decoded.largest,
        (*unreadable, *folder.left_out),
    )
    labels = None if folder.labels is None else folder.labels[readable]
    fingerprint = _fingerprint(names, lengths[readable], labels, folder.class_names)
    return Dataset(images, labels, folder.class_names, preflight, names, fingerprint)


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
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


def _decode_to_memory(folder: ImageFolder, on_progress: Progress | None) -> tuple[NDArray[np.uint8], _Decoded]:
    images = np.empty((len(folder), folder.image_size, folder.image_size, 3), np.uint8)
    filled = 0

    def keep(image: NDArray[np.uint8]) -> None:
        nonlocal filled
        images[filled] = image
        filled += 1

    decoded = _decode(folder, keep, on_progress)
    return images[:filled], decoded


def _decode_to_disk(
    folder: ImageFolder, key: str, cache_dir: Path, on_progress: Progress | None
) -> tuple[NDArray[np.uint8], _Decoded]:
    file, notes = cache_dir / f"{key}.npy", cache_dir / f"{key}.json"
    if (found := _reopen(folder, file, notes)) is not None:
        return found
    with _disk_errors(cache_dir, len(folder) * _image_bytes(folder.image_size)):
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache_dir, key)
        temporary = cache_dir / f"{key}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("wb") as out:
                _write_header(out, folder, 0)
                decoded = _decode(folder, lambda image: out.write(image.data), on_progress)
                out.seek(0)
                _write_header(out, folder, len(folder) - len(decoded.unreadable))
                out.flush()
                os.fsync(out.fileno())
            # Another machine may have done the same meanwhile. Its file stays where it is: to replace a file that
            # other machines have mapped takes it from under them on NFS.
            if (found := _reopen(folder, file, notes)) is not None:
                return found
            # The notes first: the images are the sign that both are there.
            unfinished = temporary.with_suffix(".json.tmp")
            unfinished.write_text(json.dumps(asdict(decoded)))
            unfinished.replace(notes)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    return np.load(file, mmap_mode="r"), decoded


def _decode(folder: ImageFolder, keep: Callable[[NDArray[np.uint8]], Any], on_progress: Progress | None) -> _Decoded:
    """Give every readable image to ``keep`` in order. Raises ValueError if there is none."""
    unreadable: dict[str, str] = {}
    smallest = largest = None
    # Pillow warns about odd metadata and the like. Threads share the filters, so they are set here, around all of them.
    with warnings.catch_warnings(), closing(_load_all(folder)) as results:
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for done, (name, result) in enumerate(zip(folder.names, results, strict=True), start=1):
            if isinstance(result, UnreadableImage):
                unreadable[name] = result.reason
            else:
                image, size = result
                keep(image)
                smallest = min(smallest or size, size, key=math.prod)
                largest = max(largest or size, size, key=math.prod)
            if on_progress is not None:
                on_progress(done, len(folder))
    if smallest is None or largest is None:
        name, reason = next(iter(unreadable.items()))
        raise ValueError(
            f"none of the {len(folder):,} images in {folder.root} can be read; "
            f"the first is {printable(name)} ({reason})"
        )
    return _Decoded(unreadable, smallest, largest)


def _load_all(folder: ImageFolder) -> Generator[_Loaded, None, None]:
    """Each image in order, decoded by as many threads as there are processors."""

    def attempt(path: Path) -> _Loaded:
        try:
            return load_with_size(path, folder.image_size)
        except UnreadableImage as error:
            return error

    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        paths = iter(folder.paths)
        # Images wait here for their turn to be written; a window keeps them few.
        window = deque(pool.submit(attempt, path) for path in islice(paths, 4 * threads))
        while window:
            yield window.popleft().result()
            window.extend(pool.submit(attempt, path) for path in islice(paths, 1))


def _reopen(folder: ImageFolder, file: Path, notes: Path) -> tuple[NDArray[np.uint8], _Decoded] | None:
    """The files of an earlier run, or None if they are not there or not whole."""
    try:
        found = json.loads(notes.read_text())
        decoded = _Decoded(found["unreadable"], tuple(found["smallest"]), tuple(found["largest"]))
        images = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    expected = (len(folder) - len(decoded.unreadable), folder.image_size, folder.image_size, 3)
    return (images, decoded) if images.shape == expected and images.dtype == np.uint8 else None


def _key_and_lengths(folder: ImageFolder) -> tuple[str, NDArray[np.int64]]:
    """The cache file's name, and the length of every image file in bytes, from one look at each.

    The name changes with whatever may change a pixel: the files, by name, length, times and inode, and how they are
    decoded.
    """
    digest = hashlib.sha256(f"{_FORMAT} {folder.image_size}\n".encode())
    lengths = np.zeros(len(folder), np.int64)
    for i, (name, path) in enumerate(zip(folder.names, folder.paths, strict=True)):
        try:
            stat = path.stat()
            lengths[i] = stat.st_size
            state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        except OSError:  # gone meanwhile; decoding will say so
            state = "missing"
        digest.update(os.fsencode(name) + f"\0{state}\n".encode())
    return digest.hexdigest(), lengths


def _fingerprint(
    names: Sequence[str],
    lengths: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
) -> str:
    digest = hashlib.sha256(json.dumps(class_names).encode())
    classes = repeat(None) if labels is None else labels.tolist()
    for name, length, label in zip(names, lengths.tolist(), classes, strict=False):
        digest.update(os.fsencode(name) + f"\0{length} {label}\n".encode())
    return digest.hexdigest()


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdiff"


@contextmanager
def _disk_errors(cache_dir: Path, needed: int) -> Iterator[None]:
    remedy = f"it needs {_gib(needed)} for decoded images; choose another folder as cache_dir"
    try:
        existing = next(p for p in (cache_dir, *cache_dir.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ValueError(f"cache_dir {cache_dir} has {_gib(free)} free, {remedy}")
        yield
    except OSError as error:
        raise ValueError(f"cache_dir {cache_dir} cannot be written ({error.strerror}), {remedy}") from error


def _remove_stale(cache_dir: Path, key: str) -> None:
    for left in cache_dir.glob(f"{key}.*.tmp"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            left.unlink(missing_ok=True)


def _write_header(out: Any, folder: ImageFolder, n: int) -> None:
    """The .npy header; numpy leaves room in it for the first number to grow, so its length stays the same."""
    shape = (n, folder.image_size, folder.image_size, 3)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _image_bytes(image_size: int) -> int:
    return image_size * image_size * 3


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"
