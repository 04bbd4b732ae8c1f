"""Timing and memory: pairs by rounds, and a program whose memory is known."""

import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.benchmarks import harness
from fastdiff.benchmarks.harness import Timing, interleaved, peak_bytes

from .support import CPU

MIB = 2**20


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    found = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 1, CPU)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [t.name for t in found] == ["a", "b"]
    assert found[1].baseline == found[0].seconds


def test_another_baseline() -> None:
    runs = {"a": lambda: None, "b": lambda: None}
    a, b = interleaved(runs, 2, 0, CPU, baseline="b")
    assert a.baseline == b.seconds
    (alone,) = interleaved({"a": lambda: None}, 2, 0, CPU, baseline="gone")
    assert math.isnan(alone.speedup())


def test_one_that_fails_on_the_way_leaves_the_others_their_time() -> None:
    calls: list[str] = []

    def fails_in_its_second_round() -> None:
        calls.append("b")
        if len(calls) > 5:
            raise RuntimeError("no more")

    runs = {"a": lambda: calls.append("a"), "b": fails_in_its_second_round, "c": lambda: None}
    errors: dict[str, Exception] = {}
    found = interleaved(runs, 3, 1, CPU, "b", errors)
    assert calls == ["a", "b", "a", "b", "a", "b", "a"]
    assert [(t.name, len(t.seconds)) for t in found] == [("a", 3), ("c", 3)]
    assert math.isnan(found[0].speedup())
    assert list(errors) == ["b"]
    with pytest.raises(RuntimeError, match="no more"):
        interleaved(runs, 1, 0, CPU)


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
