"""Timing and memory: pairs by rounds, and a program whose memory is known."""

import functools
import gc
import itertools
import math
import re
import subprocess
import weakref
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.benchmarks import harness
from fastdiff.benchmarks.harness import Timing, interleaved, peak_bytes
from fastdiff.benchmarks.rehearsal import rehearsed

from .support import CPU

MIB = 2**20


def test_candidates_take_turns_each_between_two_runs_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = itertools.count(1), list[str]()
    monkeypatch.setattr(harness, "_timed", lambda run, device: run() or float(next(clock)))
    runs = {name: functools.partial(calls.append, name) for name in "pab"}
    p, a, b = interleaved(runs, 2, 0, CPU)
    assert "".join(calls) == "papbpapbp"
    assert [p.name, p.seconds, p.baseline] == ["p", [1, 5], [1, 5]]
    assert [a.name, a.seconds, a.baseline] == ["a", [2, 6], [2, 6]]  # (1 + 3) / 2, (5 + 7) / 2
    assert [b.name, b.seconds, b.baseline] == ["b", [4, 8], [4, 8]]


def test_warming_up_is_not_timed() -> None:
    calls: list[str] = []
    found = interleaved({name: functools.partial(calls.append, name) for name in "ab"}, 1, 2, CPU)
    assert "".join(calls) == "aabbaba"
    assert [len(t.seconds) for t in found] == [1, 1]
    calls.clear()
    assert len(harness.seconds_of(lambda: calls.append("a"), 3, CPU, warmup=1)) == 3
    assert len(calls) == 4


def test_another_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1)
    monkeypatch.setattr(harness, "_timed", lambda run, device: float(next(clock) ** 2))
    runs = {"a": lambda: None, "b": lambda: None}
    a, b = interleaved(runs, 2, 0, CPU, baseline="b")
    assert [a.seconds, a.baseline] == [[4, 16], [5, 17]]  # (1 + 9) / 2, (9 + 25) / 2
    assert b.seconds == b.baseline == [1, 9]
    (alone,) = interleaved({"a": lambda: None}, 2, 0, CPU, baseline="gone")
    assert len(alone.seconds) == 2
    assert math.isnan(alone.speedup())


def test_one_over_another() -> None:
    a, b = Timing("a", [1.0, 1.0, 4.0], [2.0, 2.0, 8.0]), Timing("b", [2.0, 2.0, 2.0], [2.0, 3.0, 2.0])
    assert a.speedup_over(b) == 2  # 2 and 1 times as fast as what ran beside them
    alone = Timing("b", [3.0, 4.0, 2.0], [math.nan] * 3)
    assert a.speedup_over(alone) == 3  # of 3, 4 and 0.5


def test_one_that_fails_on_the_way_leaves_the_others_their_time() -> None:
    calls: list[str] = []

    def fails_in_its_second_round() -> None:
        calls.append("b")
        if len(calls) > 5:
            raise RuntimeError("no more")

    runs = {"a": lambda: calls.append("a"), "b": fails_in_its_second_round, "c": lambda: None}
    errors: dict[str, Exception] = {}
    found = interleaved(runs, 3, 1, CPU, "b", errors)
    assert "".join(calls) == "abbabbaa"
    assert [(t.name, len(t.seconds)) for t in found] == [("a", 3), ("c", 3)]
    assert math.isnan(found[0].speedup())
    assert list(errors) == ["b"]
    with pytest.raises(RuntimeError, match="no more"):
        interleaved(runs, 1, 0, CPU)


def test_one_beside_the_first_that_fails_is_none_of_the_others_business(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, errors = itertools.count(1), dict[str, Exception]()

    def timed(run: object, device: torch.device) -> float:
        if (now := float(next(clock))) == 6:
            raise RuntimeError("no more")
        return now

    monkeypatch.setattr(harness, "_timed", timed)
    first, last = interleaved({name: lambda: None for name in "pab"}, 3, 0, CPU, errors=errors)
    # p a p b: 1 2 3 4, 5 6 7 8 where 6 is none, then without a: 9 10 11, 12
    assert (first.name, first.seconds) == ("p", [1, 5, 9])
    assert (last.name, last.seconds, last.baseline) == ("b", [4, 8, 11], [4, 8, 11])
    assert list(errors) == ["a"]


def test_a_round_of_several_parts() -> None:
    part = Timing("a", [2.0, 4.0, 6.0], [4.0, 4.0, 4.0]).divided(2)
    assert part.median == 2
    assert part.speedup() == 1


@pytest.mark.parametrize("before", [0, 3])
def test_the_memory_of_a_known_program(before: int) -> None:
    held = torch.zeros(before * MIB, dtype=torch.uint8)

    def run() -> torch.Tensor:
        a = torch.zeros(4 * MIB, dtype=torch.uint8)
        b = torch.zeros(8 * MIB, dtype=torch.uint8)
        del a
        c = torch.zeros(2 * MIB, dtype=torch.uint8)
        return b[: 2 * MIB] + c  # 8 + 2 + 2

    assert peak_bytes(run, CPU) == pytest.approx(12 * MIB, abs=4096)
    assert held.nbytes == before * MIB


def test_the_memory_of_a_backward_pass() -> None:
    x = torch.zeros(MIB, requires_grad=True)  # 4 MiB

    def run() -> None:
        y = x.exp()  # kept for the backward pass
        y.sum().backward()
        x.grad = None

    found = peak_bytes(run, CPU)
    assert 8 * MIB <= found <= 12 * MIB + 4096


def test_the_commit_is_this_checkout_s_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path.resolve() / "project"
    package = project / "vendored" / "benchmarks"
    package.mkdir(parents=True)
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(harness, "RESULTS", package / "results")
    assert harness.environment(CPU)["commit"] == f"fastdiff {fastdiff.__version__}"
    monkeypatch.setattr(harness, "RESULTS", project / "benchmarks" / "results")
    assert re.fullmatch(r"[0-9a-f]{7,}", harness.environment(CPU)["commit"])
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "gone" / "benchmarks" / "results")
    assert harness.environment(CPU)["commit"] == f"fastdiff {fastdiff.__version__}"


def test_counting_memory_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_bytes(lambda: torch.zeros(8), CPU)
    assert capfd.readouterr() == ("", "")


def test_launches_are_counted_whoever_asks_for_them() -> None:
    counts = {"cudaGraphLaunch": 20, "cudaStreamIsCapturing": 4, "aten::copy_": 9, "Memcpy HtoD": 1}
    assert harness.launches(counts) == (20, 0)
    others = {"cudaLaunchKernel": 3, "cuLaunchKernelEx": 2, "cudaMemcpyAsync": 1, "cudaMemsetAsync": 1}
    assert harness.launches(counts | others) == (20, 7)
    assert harness.launches({"hipGraphLaunch": 20, "hipExtModuleLaunchKernel": 2}) == (20, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_says_what_a_step_costs_the_host() -> None:
    gpu = torch.device("cuda")
    x = torch.zeros(4, device=gpu)
    with harness.side_stream(gpu):
        replay = harness.graphed(lambda: x.add_(1), gpu)
        assert harness.watched(replay, gpu).calls == f"{harness.ALONE} no wait for the device"
        assert "waits for the device" in harness.watched(x.sum().item, gpu).calls


def test_a_rehearsal_stands_for_a_gpu() -> None:
    ran: list[int] = []
    assert harness.watched(lambda: None, CPU) == harness.Watched("", "")
    with rehearsed(), harness.side_stream(CPU):
        assert harness.seconds_of(lambda: ran.append(1), 2, CPU, warmup=0) > [0, 0]
        replay = harness.graphed(lambda: ran.append(2), CPU)
        assert ran == [1, 1, 2]  # as if it were captured
        replay()
        assert ran == [1, 1, 2]
        seen = harness.watched(lambda: ran.append(3), CPU)
    assert seen.calls == "graph launches 0, others 0, no wait for the device"
    assert ran == [1, 1, 2, *[3] * 2 * harness.STEPS]


def test_a_graph_keeps_what_it_reads() -> None:
    held = torch.zeros(1)
    alive = weakref.ref(held)
    with rehearsed():
        replay = harness.graphed(functools.partial(held.add_, 1), CPU)
    del held
    gc.collect()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None
