"""The suite data: opening a folder for the first time and again, batches from it, the wait before the first update."""

import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

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

P = ParamSpec("P")
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


@dataclass(frozen=True)
class Extent:
    """How much is measured: the numbers of files, the one at which the peer and the start are timed, and how often."""

    files: tuple[int, ...]
    compared_at: int
    rounds: int
    starts: int


QUICK = Extent((250, 1_000, 4_000), 1_000, rounds=5, starts=2)
FULL = Extent((1_000, 10_000, 100_000), 10_000, rounds=11, starts=5)


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
    extent = QUICK if quick else FULL
    if rounds:
        extent = replace(extent, rounds=rounds, starts=min(extent.starts, rounds))
    opened: dict[str, list[float]] = {"cold": [], "warm": []}
    for files in extent.files:
        images, cache = folder / "images", folder / "cache"
        write_images(images, files)
        config = DataConfig(data_dir=str(images), cache=Cache.DISK, cache_dir=str(cache), flip=True)
        cold = _in_new_process(_open, config, 1)
        warm, stream = _in_new_process(_open_and_draw, config, extent, files == extent.compared_at)
        for name, found in (("cold", cold), ("warm", warm)):
            # The cold time is measured once: a ratio to it would only have the spread of the other time.
            timing = alone(name, found.seconds)
            opened[name].append(timing.median)
            remark = f"memory grew by {found.grown_gib:.3f} GiB"
            if files == extent.files[-1]:
                remark += f"; time ~ files^{slope(extent.files, opened[name]):.2f}"
            workload = f"opening {files:,} files"
            yield Row("data", workload, name, timing, images=files, peak_gib=found.peak_gib, remark=remark)
        yield from stream
        if files == extent.compared_at:
            yield from measure_startup(images, folder / "start", extent.starts, device, compiled=not quick)
        for used in (images, cache, folder / "start"):
            shutil.rmtree(used, ignore_errors=True)


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` PNG files of smooth colours with a little noise, about as large as those of photographs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    drawn = folder / "drawn.png"
    contents = []
    for _ in range(min(count, DISTINCT)):
        colours = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((STORED, STORED), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 6, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(drawn)
        contents.append(drawn.read_bytes())
    drawn.unlink()
    for i in range(count):
        (folder / f"{i:06d}.png").write_bytes(contents[i % len(contents)])


@dataclass(frozen=True)
class _Opened:
    """The seconds of each opening, the peak memory of the process, and its growth from the start."""

    seconds: list[float]
    peak_gib: float
    grown_gib: float


def _open(config: DataConfig, rounds: int) -> _Opened:
    before = _memory_gib("VmRSS")
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        load_dataset(config, WANTED, labelled=False)
        seconds.append(time.perf_counter() - began)
    peak = _memory_gib("VmHWM")
    return _Opened(seconds, peak, peak - before)


def _open_and_draw(config: DataConfig, extent: Extent, compared: bool) -> tuple[_Opened, list[Row]]:
    """Opening with a warm cache, and the rows of batches, the peer's first if ``compared``."""
    torch.set_num_threads(1)  # as the peer's worker has
    before = _memory_gib("VmRSS")
    opened = _open(config, extent.rounds)
    dataset = load_dataset(config, WANTED, labelled=False)
    files = len(dataset.images)
    with closing(batches(dataset, config, BATCH, seed=0, start_step=0)) as drawn:
        peer = {PEER: _decoded_every_time(Path(config.data_dir))} if compared else {}
        timings = _taking_turns({**peer, "fastdiff": (normalised(images) for images, _ in drawn)}, extent.rounds)
    peak = _memory_gib("VmHWM")
    workload = f"batches of {BATCH} from {files:,} files"
    rows = [Row("data", workload, timing.name, timing, images=BATCH) for timing in timings]
    rows[-1] = replace(rows[-1], peak_gib=peak, remark=f"memory grew by {peak - before:.3f} GiB, the mapped file's too")
    return opened, rows


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


def _in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    others = set(multiprocessing.active_children())
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(function, *args, **kwargs).result()
            except BaseException:  # the pool would wait until the work is done
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    except BrokenProcessPool:
        raise ChildProcessError("the process that reads the images was killed: it may have run out of memory") from None


def _memory_gib(field: str) -> float:
    """Memory of this process in GiB, now (VmRSS) or at its peak (VmHWM); NaN if the system does not report it.

    getrusage is no substitute: in a new process its peak starts at that of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:"))
