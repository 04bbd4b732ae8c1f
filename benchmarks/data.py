"""The suite data: opening a folder for the first time and again, batches from it, the wait before the first update."""

import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.runs import alone, measure_startup
from fastdiff.config import Cache, DataConfig
from fastdiff.data import batches, load_dataset, normalised, resize_and_crop
from fastdiff.data.batches import AHEAD

T = TypeVar("T")

STORED, WANTED = 64, 32
"""Sizes in pixels of the files, and of the images made from them."""

DISTINCT = 256
"""Number of distinct images. Further files repeat them, which makes no difference to the cache or a reader."""

BATCH = 64
PEER = "as improved-diffusion: DataLoader, decode every time"

_TURN_SECONDS = 0.4
_QUIET_SECONDS = 0.2
"""Pause after a turn, so that prefetching has ended before the next turn is timed."""

MEASURED = {True: ((250, 1_000, 4_000), 5, 2), False: ((1_000, 10_000, 100_000), 11, 5)}
"""The numbers of files, the rounds and the warm starts, by whether the run is quick. The peer and the start are
measured at the second number of files."""


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent p of seconds ~ sizes^p by least squares in logarithms; NaN for fewer than two different sizes."""
    if len(set(sizes)) < 2:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure_data(quick: bool, folder: Path, device: torch.device, rounds: int | None = None) -> Iterator[Row]:
    """Rows of the suite data, on 64-pixel PNG files that are resized to 32, in ``folder``, which must be empty.

    The files have just been written: they are read from memory, and the timings show work, not a disk. A new process
    opens the folder; the row has its peak memory. Batches are measured on the CPU, as fp32 in [-1, 1]. Only the
    start-up uses ``device``.
    """
    numbers, usual, starts = MEASURED[quick]
    rounds = rounds or usual
    opened: dict[str, list[float]] = {"cold": [], "warm": []}
    for files in numbers:
        images, cache = folder / "images", folder / "cache"
        write_images(images, files)
        config = DataConfig(data_dir=str(images), cache=Cache.DISK, cache_dir=str(cache), flip=True)
        compared = files == numbers[1]
        cold = _in_new_process(_open, config, "cold", 1)
        warm, *drawn = _in_new_process(_open_and_draw, config, rounds, compared)
        for row in (cold, warm):
            if row.timing:
                opened[row.candidate].append(row.timing.median)
            if files == numbers[-1]:
                row = replace(row, remark=f"{row.remark}; time ~ files^{slope(numbers, opened[row.candidate]):.2f}")
            yield row
        yield from drawn
        if compared:
            yield from measure_startup(images, folder / "start", min(starts, rounds), device, compiled=not quick)
        for used in (images, cache, folder / "start"):
            shutil.rmtree(used, ignore_errors=True)


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` PNG files of smooth colours with a little noise, about as large as those of photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06d}.png"
        if i >= DISTINCT:
            shutil.copyfile(folder / f"{i % DISTINCT:06d}.png", path)
            continue
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((STORED, STORED), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


def _open(config: DataConfig, name: str, rounds: int) -> Row:
    """The seconds of each opening, and the peak memory of the process."""
    before = _memory_gib("VmRSS")
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        files = len(load_dataset(config, WANTED, labelled=False).images)
        seconds.append(time.perf_counter() - began)
    peak = _memory_gib("VmHWM")
    remark = f"memory grew by {peak - before:.3f} GiB"
    timing = alone(name, seconds)  # the cold time is measured once: a ratio to it would have the other's spread only
    return Row("data", f"opening {files:,} files", name, timing, images=files, peak_gib=peak, remark=remark)


def _open_and_draw(config: DataConfig, rounds: int, compared: bool) -> list[Row]:
    """The rows of opening with a warm cache and of batches, the peer's first if ``compared``."""
    torch.set_num_threads(1)  # as the peer's worker has
    before = _memory_gib("VmRSS")
    opened = _open(config, "warm", rounds)
    dataset = load_dataset(config, WANTED, labelled=False)
    with closing(batches(dataset, config, BATCH, seed=0, start_step=0)) as drawn:
        peer = {PEER: _decoded_every_time(Path(config.data_dir))} if compared else {}
        timings = _taking_turns({**peer, "fastdiff": (normalised(images) for images, _ in drawn)}, rounds)
    peak = _memory_gib("VmHWM")
    workload = f"batches of {BATCH} from {opened.images:,} files"
    rows = [Row("data", workload, timing.name, timing, images=BATCH) for timing in timings]
    rows[-1] = replace(rows[-1], peak_gib=peak, remark=f"memory grew by {peak - before:.3f} GiB, the mapped file's too")
    return [opened, *rows]


def _taking_turns(streams: Mapping[str, Iterator[Tensor]], rounds: int) -> list[Timing]:
    """The seconds per batch of each stream: the mean of a turn, for ``rounds`` turns of each."""
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name, stream in streams.items():
            for _ in range(AHEAD):
                next(stream)  # these became ready during the other turns
            taken, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < _TURN_SECONDS:
                next(stream)
                taken += 1
            seconds[name].append(elapsed / taken)
            time.sleep(_QUIET_SECONDS)
    baseline = next(iter(seconds.values()))
    return [Timing(name, values, baseline) for name, values in seconds.items()]


class _Files(torch.utils.data.Dataset[NDArray[np.float32]]):
    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        with Image.open(self._paths[index]) as image:
            pixels = resize_and_crop(image.convert("RGB"), WANTED)  # the original operations, one for one
        return (pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)


def _decoded_every_time(folder: Path) -> Iterator[Tensor]:
    """Batches as improved-diffusion makes them: one worker, which decodes each image every time it is drawn."""
    # The worker of a spawned process would be spawned, too, and import PyTorch again in every epoch.
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    loader = torch.utils.data.DataLoader(
        _Files(folder), BATCH, shuffle=True, num_workers=1, drop_last=True, multiprocessing_context=start
    )
    while True:
        yield from loader


def _in_new_process(function: Callable[..., T], *args: object) -> T:
    """The result of a call in a new interpreter, which ends with the call, or with an error here, such as Ctrl-C."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            said = "the process that reads the images was killed: it may have run out of memory"
            raise ChildProcessError(said) from None
        except BaseException:  # the pool would wait until the work is done
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _memory_gib(field: str) -> float:
    """Memory of this process in GiB, now (VmRSS) or at its peak (VmHWM); NaN if the system does not report it.

    getrusage is no substitute: in a new process its peak starts at that of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:"))
