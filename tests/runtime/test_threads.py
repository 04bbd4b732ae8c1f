"""How many threads a command takes, how they wait, and what is said of a job beside other work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.runtime import threads
from fastdiff.runtime.threads import Pace, fit_to_cores, usable_cores, wait_briefly


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, 64),
        ({}, 64),
        ({"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu.cfs_quota_us": "250000\n"}, 64),
        ({"cpu.max": "9900000 100000\n"}, 64),
    ],
)
def test_a_quota_counts(files: dict[str, str], cores: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_QUOTA", "_QUOTA_1", "_PERIOD_1"):
        monkeypatch.setattr(threads, name, tmp_path / getattr(threads, name).name)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("cores", "said", "expected"),
    [
        (2.9, {}, 2),
        (0.5, {}, 1),
        (64, {}, 4),  # torch's own number, which may be that of the cores without hyperthreads
        (1, {"OMP_NUM_THREADS": "4"}, 4),
        (1, {"MKL_NUM_THREADS": "4"}, 4),
        (1, {"OMP_NUM_THREADS": ""}, 1),
    ],
)
def test_no_more_threads_than_cores(
    cores: float, said: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    now = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.__setitem__(0, number))
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    fit_to_cores()
    assert now == [expected]


def test_threads_wait_briefly_unless_they_are_told_to() -> None:
    untold: dict[str, str] = {}
    wait_briefly(untold)
    assert list(untold) == ["GOMP_SPINCOUNT"]
    assert 0 < int(untold["GOMP_SPINCOUNT"]) < 300_000  # OpenMP's own
    for told in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}):
        before = dict(told)
        wait_briefly(told)
        assert told == before


def said(
    monkeypatch: pytest.MonkeyPatch,
    speeds: list[float],
    loads: list[float],
    number: int = 2,
    on_cpu: bool = True,
) -> list[str | None]:
    """What a job on two cores says, interval by interval."""
    rest = iter(loads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "load_average", lambda: next(rest))
    pace = Pace("updates", on_cpu)
    return [pace.warning(speed) for speed in speeds]


START, SLOW = [80.0, 100.0, 120.0], [12.5, 12.5, 12.5]


def test_slower_than_at_the_start_beside_other_work_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, START + SLOW + SLOW, [1.0] * 5 + [6.3] * 4)
    assert [line is not None for line in lines] == [False] * 7 + [True, False]
    assert lines[7] == (
        "warning: updates take 8.0 times as long as at the start, and the load is 6.3 on 2 cores: other processes use "
        "them; OMP_NUM_THREADS=1 may be faster than 2 threads that wait for each other"
    )


@pytest.mark.parametrize(
    ("speeds", "loads"),
    [
        (START + SLOW, [1.0] * 3 + [2.0] * 3),  # slow, but not for lack of cores
        (START + [40.0] * 6, [2.5] * 9),  # not that slow
        (START + [12.5, 12.5, 100.0] * 3, [2.5] * 12),  # not for long
        ([0.0] * 9, [2.5] * 9),  # never faster
    ],
)
def test_nothing_is_said_of_another_slowness(
    speeds: list[float], loads: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(said(monkeypatch, speeds, loads))


def test_a_job_that_starts_beside_other_work_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, START + SLOW, [4.0] * 6)
    assert [line is not None for line in lines] == [False, False, True, False, False, False]
    assert lines[2] == (
        "warning: the load is 4.0 on 2 cores: other processes use them; OMP_NUM_THREADS=1 may be faster than 2 threads "
        "that wait for each other"
    )


@pytest.mark.parametrize("how", [{"number": 1}, {"on_cpu": False}])
def test_one_thread_and_a_gpu_have_no_remedy(how: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(said(monkeypatch, START + SLOW, [9.0] * 6, **how))  # type: ignore[arg-type]


TEAMS = """
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
import torch
from fastdiff.config import TrainConfig
from fastdiff.data.threads import in_order
from fastdiff.training.saver import Saver

def compute():
    return float((torch.ones(10**6) + 1).sum())

def grown():
    before = len(os.listdir("/proc/self/task"))
    compute()
    return len(os.listdir("/proc/self/task")) - before

with ThreadPoolExecutor(1) as other:
    print(grown(), other.submit(grown).result())
with TemporaryDirectory() as folder:
    saver = Saver(Path(folder), TrainConfig(), print)
    print(saver._thread.submit(grown).result(), *in_order(lambda _: grown(), [None]), torch.get_num_threads())
"""


@pytest.mark.skipif(not threads._gnu_openmps(), reason="PyTorch has another OpenMP here")
def test_a_thread_in_the_background_has_no_team() -> None:
    """Others get a second thread each with their first large operation, and keep it."""
    # else teams may be smaller on a busy machine
    environment = os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_DYNAMIC": "false"}
    done = subprocess.run(
        [sys.executable, "-c", TEAMS], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines() == ["1 1", "0 0 2"]
