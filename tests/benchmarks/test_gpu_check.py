"""gpu_check, small and on a CPU: its stages run, it keeps what it has, and it gives its verdicts."""

import io
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastdiff.benchmarks import gpu_check, gpu_report, gpu_stages, harness
from fastdiff.benchmarks.cases import Case, norm_case
from fastdiff.benchmarks.gpu_check import Check
from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.rehearsal import CUDAGraph, rehearsed
from fastdiff.benchmarks.rows import Row, read_rows
from fastdiff.benchmarks.targets import sampling_verdicts

from .support import CPU, WORKLOAD

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_fifteen_seconds_of_a_rehearsal(tmp_path: Path) -> None:
    command = [ROOT / "benchmarks" / "gpu_check.sh", "--rehearse", "--minutes", "0.25", "--out", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = read_rows(tmp_path / "rows.csv")
    assert {"correct", "model", "sanitize"} <= {row["workload"] for row in rows if row["suite"] == "gpu_check"}
    assert run.stdout.endswith((tmp_path / "summary.md").read_text() + "\n")
    assert len(list(tmp_path.iterdir())) <= 8


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "there is no GPU: --rehearse"), (["--minutes", "0"], "--minutes must be a positive")]
)
def test_what_cannot_run_is_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert said in capsys.readouterr().err


@pytest.fixture
def rehearsal() -> Iterator[None]:
    with rehearsed():
        yield


def messages(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(gpu_stages.MARK)]
    return [json.loads(line.removeprefix(gpu_stages.MARK)) for line in lines]


def rows_in(sent: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for message in sent for row in message.get("rows", [])]


@pytest.mark.usefixtures("rehearsal")
def test_bars_are_measured_and_plans_tuned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cases(_: object) -> list[Case]:
        one, other = (norm_case(2, 32, size, harness.torch.float16, "contiguous", on_gpu=True) for size in (4, 8))
        for case in (one, other):
            del case.candidates["compile"]  # type: ignore[attr-defined]  # takes long
        return [one, other]

    monkeypatch.setattr(gpu_stages, "cases_of", cases)
    graphs = CUDAGraph.replays
    gpu_stages.bars(CPU, math.inf)
    sent = messages(capsys)
    rows = rows_in(sent)
    assert CUDAGraph.replays > graphs
    measured = {(row["workload"], row["candidate"]) for row in rows if row["suite"] == "kernels"}
    assert len(measured) == 2 * (4 + 2)  # both directions; of the second case only the fast ones
    assert {"as it is"} <= {row["candidate"] for row in rows if row["suite"] == "tune"}
    assert all(row["median_s"] > 0 for row in rows if row["candidate"] in ("triton", "reference"))
    assert any("norm backward" in line for line in [m["verdicts"] for m in sent if "verdicts" in m][-1])
    assert any("advice" in message for message in sent)
    gpu_stages.bars(CPU, 0)
    assert not rows_in(messages(capsys))  # after the deadline nothing is started


@pytest.mark.usefixtures("rehearsal")
@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("eager", ["+ fused optimizer", "+ fused optimizer, our kernels"]),
        ("sample 1", ["model call", "model call and step", "torch kernels"]),
        ("ladder", []),
    ],
)
def test_candidates_of_a_model_wait_until_they_are_told(
    name: str,
    candidates: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_stages, "workload_of", lambda *_: WORKLOAD)
    monkeypatch.setattr("fastdiff.benchmarks.ladder.LONG", 1)  # too short to be compiled
    told: list[int] = []
    gpu_stages.model(name, CPU, tmp_path / "lock", lambda: told.append(len(rows_in(messages(capsys)))))
    rows = rows_in(messages(capsys))
    assert [row["candidate"] for row in rows] == candidates
    assert all(row["median_s"] > 0 for row in rows)
    assert told == [0] * bool(candidates)


def check(folder: Path, seconds: float = 1000, stages: tuple[str, ...] = tuple(gpu_check.STAGES)) -> Check:
    scratch = folder / "scratch"
    scratch.mkdir()
    return Check(folder, scratch, time.monotonic() + seconds, stages, True, io.StringIO(), dict(os.environ))


def test_results_are_kept_as_they_come(tmp_path: Path) -> None:
    subject = check(tmp_path)
    timed = harness.Timing("trainer", [0.05], [math.nan])
    row = Row("train", "a model, batch 64", "trainer", timed, flops=1e12).as_dict() | environment(CPU)
    subject.receive({"rows": [row]})
    subject.receive({"verdicts": ["met    norm: 1.00", "       attention: nan"], "of": "kernels"})
    subject.receive({"peak": 1e14, "said": "in bf16: copy 1 GB/s"})
    subject.receive({"kernels": "1 ms norm", "advice": ["norm: 3 stages"]})
    subject.keep("correct", "tests/kernels", "3 passed")
    summary = (tmp_path / "summary.md").read_text()
    for line in (
        "- met    norm: 1.00",
        "- correct, tests/kernels: 3 passed",
        "| a model, batch 64 | trainer | 50.00 |  |",
        "training step, MFU: 0.20",
        "in bf16: copy 1 GB/s",
        "- norm: 3 stages",
    ):
        assert line in summary
    assert len(read_rows(tmp_path / "rows.csv")) == 2
    assert (tmp_path / "kernels.txt").read_text() == "1 ms norm\n\n"
    assert not subject.failed


def test_outcomes_of_tests_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = check(tmp_path)
    monkeypatch.setenv("REPORT", str(tmp_path / "scratch" / "report"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    for outcome, when in (("passed", "setup"), ("passed", "call"), ("failed", "call"), ("skipped", "setup")):
        report = SimpleNamespace(
            nodeid=f"tests/kernels/test_norm.py::test_{outcome}",
            outcome=outcome,
            when=when,
            passed=outcome == "passed",
            failed=outcome == "failed",
            longrepr="because",
        )
        gpu_report.pytest_runtest_logreport(report)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")  # the one that collects them reports, too
    gpu_report.pytest_runtest_logreport(report)
    monkeypatch.setattr(subject, "_pytest", lambda *_: SimpleNamespace(wait=lambda: 124))
    subject._correct(10)
    first, failure, second = ((row["candidate"], row["remark"]) for row in subject.rows)
    assert first == ("tests/kernels", "1 passed, 1 failed, 1 skipped, stopped when its time was up")
    assert second == ("tests/parity", "0 passed, 0 failed, 0 skipped, stopped when its time was up")
    assert failure == ("tests/kernels/test_norm.py::test_failed", "failed, see failures.txt")
    assert "because" in (tmp_path / "failures.txt").read_text()
    assert subject.failed


class Prepared:
    """A candidate's process that is ready at once, or never."""

    events: list[tuple[str, str]]

    def __init__(self, subject: Check, part: str, option: str, name: str, *rest: str) -> None:
        self.name, self.ready, self.ended = name, threading.Event(), threading.Event()
        if name != "compile":
            self.ready.set()

    def go(self) -> None:
        self.events.append((self.name, "go"))
        self.ended.set()

    def signal(self, number: int) -> None:
        self.events.append((self.name, gpu_check.signal.Signals(number).name))


def test_one_model_is_measured_while_the_others_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "Process", Prepared)
    monkeypatch.setattr(gpu_check, "MODELS", ("trainer", "compile", "eager"))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    Prepared.events = events = []
    subject = check(tmp_path, 1.5, ("model",))
    subject.run()
    first = [("trainer", "go"), ("eager", "go")]
    assert [event for event in events if event[1] == "go"] == first
    stopped, told, continued = events[:2], events[2], events[3:5]
    assert (stopped, told) == ([("compile", "SIGSTOP"), ("eager", "SIGSTOP")], ("trainer", "go"))
    assert continued == [("compile", "SIGCONT"), ("eager", "SIGCONT")]
    assert [(row["candidate"], row["remark"]) for row in subject.rows] == [("compile", "not measured: the time is up")]
    assert ("compile", "SIGKILL") in events


def test_without_compute_sanitizer_that_is_a_row(tmp_path: Path) -> None:
    subject = check(tmp_path)
    subject.rehearse = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "environment", lambda _: environment(CPU))
        patch.setattr("shutil.which", lambda _: None)
        subject._sanitize(10)
    (row,) = subject.rows
    assert (row["candidate"], row["remark"]) == ("memcheck", "not run: compute-sanitizer is not installed")


def test_what_compute_sanitizer_finds_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = check(tmp_path)

    def run(*_: object) -> object:
        invalid = "========= Invalid __global__ read of size 4 bytes\n=========     at norm+0x90\n"
        (subject.scratch / "memcheck").write_text("========= COMPUTE-SANITIZER\n" + 2 * invalid)
        (subject.scratch / "report").write_text('{"test": "a", "outcome": "passed"}\n')
        return SimpleNamespace(wait=lambda: 124)

    monkeypatch.setattr(subject, "_pytest", run)
    subject._sanitize(10)
    assert [row["remark"] for row in subject.rows] == [
        "Invalid __global__ read of size 4 bytes",
        "1 tests, 2 errors, stopped when its time was up",
    ]
    assert subject.failed


@pytest.mark.slow
def test_a_process_that_fails_is_a_failure(tmp_path: Path) -> None:
    subject = check(tmp_path)
    subject.pending = ["neither", "no such model"]
    with (tmp_path / "log.txt").open("a") as subject.log:
        subject.prepare_next()
        for name in ("no such model", "neither"):  # the next one is prepared although the first was never ready
            assert subject.models[name].ended.wait(60)
    row, _ = subject.rows
    assert "ended with status 1, see log.txt" in str(row["remark"])
    assert subject.failed
    assert "KeyError" in (tmp_path / "log.txt").read_text()


def test_a_wrong_candidate_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("kernels", "norm", "triton", None, remark="ValueError: not timed", failed=True)
    gpu_stages.send_rows([row], CPU)
    (message,) = messages(capsys)
    subject = check(tmp_path)
    subject.receive(message)
    assert subject.failed
    assert "- norm, triton: ValueError: not timed" in (tmp_path / "summary.md").read_text()


def test_the_first_tests_come_first() -> None:
    names = ("test_backend", "test_arithmetic", "test_every_kernel", "test_attention_triton")
    items = [SimpleNamespace(path=Path(f"tests/kernels/{name}.py")) for name in names]
    gpu_report.pytest_collection_modifyitems(items)
    assert [item.path.stem for item in items] == [names[2], names[3], names[1], names[0]]


def row(candidate: str, batch: int = 1, seconds: float = 1.0, remark: str = "") -> dict[str, str]:
    workload = f"imagenet64_uncond, batch {batch}"
    return {"workload": workload, "candidate": candidate, "median_s": str(seconds), "remark": remark}


ALONE = "graph launches 1, others 0, no wait for the device"


def test_sampling_is_judged_by_the_faster_rival() -> None:
    rows = [
        row("model call and step", remark=ALONE),
        row("max-autotune", seconds=1.5),
        row("torch kernels", seconds=1.1),
    ]
    rows += [row("max-autotune-no-cudagraphs", seconds=2.5)]
    rows += [row("model call and step", 256, remark=ALONE), row("max-autotune", 256, 1.2)]
    one, sixteen, many, alone, waits = sampling_verdicts(rows)
    assert (one.worst, one.where) == (1.5, "imagenet64_uncond, batch 1, max-autotune")
    assert many.worst == 1.2
    assert str(many).startswith("met")
    assert math.isnan(sixteen.worst)
    assert (alone.worst, waits.worst) == (1, 1)


def test_a_step_without_a_time_misses_its_mark() -> None:
    missed, *_ = sampling_verdicts([row("model call and step", seconds=math.nan, remark="out of memory")])
    assert (missed.worst, missed.where) == (0, "imagenet64_uncond, batch 1: out of memory")
    unknown, *_ = sampling_verdicts([row("model call and step"), row("max-autotune", seconds=math.nan)])
    assert math.isnan(unknown.worst)  # a rival that does not run is no rival


@pytest.mark.parametrize(
    ("remark", "launch", "wait"),
    [
        (ALONE, 1, 1),
        ("graph launches 1, others 0.05, no wait for the device", 0, 1),
        ("graph launches 0, others 400, no wait for the device", 0, 1),
        ("graph launches 1, others 0, waits for the device: called a synchronizing CUDA operation", 1, 0),
    ],
)
def test_one_launch_and_no_wait(remark: str, launch: int, wait: int) -> None:
    *_, launched, waited = sampling_verdicts([row("model call and step", 16, remark=remark)])
    assert (launched.worst, waited.worst) == (launch, wait)
