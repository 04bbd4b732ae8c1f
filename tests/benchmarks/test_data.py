"""The suite data: what its rows say, that the cache is cold once and warm from then on, and that the peer does the same
work."""

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.benchmarks import data, runs
from fastdiff.benchmarks.data import slope
from fastdiff.config import DataConfig
from fastdiff.data import cache, load_dataset, normalised

from ..processes import FORKSERVER, Job
from .support import CPU


def test_slope_is_the_exponent() -> None:
    sizes = [1_000, 10_000, 100_000]
    assert slope(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert slope([1, 10, 100], [2, 2, 2]) == pytest.approx(0)
    assert math.isnan(slope([5], [1]))
    assert math.isnan(slope([5, 5], [1, 2]))


def test_files_are_few_images_under_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DISTINCT", 3)
    data.write_images(tmp_path / "images", 7)
    paths = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in paths] == [f"00000{i}.png" for i in range(7)]
    contents = [path.read_bytes() for path in paths]
    assert contents == [contents[i % 3] for i in range(7)]
    assert len(set(contents)) == 3
    with Image.open(paths[0]) as image:
        assert (image.size, image.mode) == ((data.STORED, data.STORED), "RGB")
    assert len(load_dataset(DataConfig(data_dir=str(tmp_path / "images")), data.WANTED, labelled=False).images) == 7


def test_the_peer_gives_the_same_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    data.write_images(folder, 5)
    images = load_dataset(DataConfig(data_dir=str(folder)), data.WANTED, labelled=False).images
    ours = normalised(torch.from_numpy(images)).numpy()
    theirs = np.stack([data._Files(folder)[i] for i in range(5)])
    assert theirs.dtype == ours.dtype == np.float32
    np.testing.assert_array_equal(theirs, ours)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes that have imported PyTorch already."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORKSERVER)


@contextmanager
def forked_child(command: Sequence[str], output: IO[str], env: Mapping[str, str]) -> Iterator[Job]:
    """``python -m fastdiff`` without the seconds that an interpreter takes; what it says stays with it."""
    assert command[1:3] == ["-m", "fastdiff"]
    job = Job(None, command[3:], Path.cwd(), env)
    try:
        yield job
    finally:
        job.kill()


@pytest.mark.parametrize("started", ["forked", pytest.param("by an interpreter", marks=pytest.mark.slow)])
def test_rows(started: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if started == "forked":
        monkeypatch.setattr(runs, "child", forked_child)
    monkeypatch.setattr(data, "_in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(data, "_TURN_SECONDS", 0.01)
    monkeypatch.setattr(data, "_QUIET_SECONDS", 0)
    monkeypatch.setitem(data.MEASURED, True, ((70, 140), 2, 1))
    monkeypatch.setattr(runs, "SMALL", runs.SMALL | {"image_size": 8, "num_channels": 32, "channel_mult": 1})
    rows = list(data.measure_data(True, tmp_path, CPU))
    model = "32 pixels, 64 channels, batch 16"
    assert [(row.workload, row.candidate, row.as_dict()["rounds"]) for row in rows] == [
        ("opening 70 files", "cold", 1),
        ("opening 70 files", "warm", 2),
        ("batches of 64 from 70 files", "fastdiff", 2),
        ("opening 140 files", "cold", 1),
        ("opening 140 files", "warm", 2),
        ("batches of 64 from 140 files", data.PEER, 2),
        ("batches of 64 from 140 files", "fastdiff", 2),
        (f"start-up, 140 files: {model}, eager", "first update, cold cache", 1),
        (f"start-up, 140 files: {model}, eager", "first update, warm cache", 1),
    ]
    assert {row.suite for row in rows} == {"data"}
    assert [row.images for row in rows] == [70, 70, 64, 140, 140, 64, 64, 0, 0]
    assert ["files^" in row.remark for row in rows] == [False] * 3 + [True] * 2 + [False] * 4
    assert not any("-" in row.remark for row in rows[-2:])  # no stage takes less than nothing
    for stage in ("imports and reading the images", "building the model", "first update"):
        assert all(stage in row.remark for row in rows[-2:])
    assert all(row.as_dict()["speedup"] == 1 for row in rows if row.candidate == data.PEER)
    # one cold measurement is nothing to quote a ratio over
    assert [row.candidate for row in rows if row.as_dict()["speedup"] > 0] == ["fastdiff", data.PEER, "fastdiff"]
    assert not list(tmp_path.iterdir())  # nothing is left


def test_cold_once_and_warm_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = cache.decode
    monkeypatch.setattr(cache, "decode", lambda *args: decoded.append(len(args[0])) or real(*args))
    monkeypatch.setattr(data, "_in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(data, "_TURN_SECONDS", 0.01)
    monkeypatch.setattr(data, "_QUIET_SECONDS", 0)
    monkeypatch.setattr(data, "measure_startup", lambda *_, **__: [])
    monkeypatch.setitem(data.MEASURED, False, ((65, 66), 2, 1))
    rows = list(data.measure_data(False, tmp_path, CPU, rounds=3))
    assert [row.as_dict()["rounds"] for row in rows] == [1, 3, 3, 1, 3, 3, 3]
    assert decoded == [65, 66]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak memory")
def test_the_peak_is_that_of_the_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # by which the new process finds this file
    held = np.ones(2**26)  # half a GiB, which the new process has not
    before, after = data._in_new_process(_let_go_of_a_quarter_gib)
    assert held.nbytes == 2**29
    assert after - before == pytest.approx(0.25, abs=0.03)


def _let_go_of_a_quarter_gib() -> tuple[float, float]:
    before = data._memory_gib("VmRSS")
    np.ones(2**25).sum()
    return before, data._memory_gib("VmHWM")


@pytest.mark.usefixtures("forked")
def test_a_reader_that_is_killed_is_an_error_of_one_line() -> None:
    with pytest.raises(ChildProcessError, match=r"^the process that reads the images was killed: .*memory$"):
        data._in_new_process(os.abort)


@pytest.mark.usefixtures("forked")
def test_a_reader_ends_with_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(Future, "result", interrupt)
    with pytest.raises(SystemExit):
        data._in_new_process(time.sleep, 10_000)  # the test's own limit is 600 seconds
    assert not multiprocessing.active_children()
