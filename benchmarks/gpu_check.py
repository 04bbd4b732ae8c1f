"""Everything that needs a GPU in one call with a budget: ``python -m fastdiff.benchmarks.gpu_check --minutes 8``.

correct   the tests of the kernels, the golden numbers through them, an update that waits for nothing
bars      every kernel beside its alternatives, against its target, and other divisions of the work than its plan's
model     a training step and a sampling step of a released model, prepared on all cores while the tests run
sanitize  compute-sanitizer on a smoke test

It needs a checkout, PyTorch, Triton, numpy, pytest, Pillow and safetensors; pytest-xdist and Liger are used if
present. Rows (rows.csv), a summary (summary.md), failures and the time of a step's kernels are written as they come. A
stage that does not fit is not started. The exit status is 1 if a test fails or a candidate of ours is wrong.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from fastdiff.benchmarks.gpu_stages import MARK, MODELS
from fastdiff.benchmarks.harness import environment
from fastdiff.benchmarks.rows import Row, append_rows
from fastdiff.benchmarks.targets import sampling_verdicts, training_verdicts

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"correct": 120, "bars": 130, "model": 200, "sanitize": 30}
"""Seconds of each stage in a run of eight minutes, in the order of their value."""
TESTS = {  # by folder: arguments on a GPU, in a rehearsal, and the share of the cores
    "tests/kernels": (
        ["tests/kernels", "-m", "not slow"],
        ["tests/kernels/test_every_kernel.py", "-m", "not slow"],
        2,
    ),
    "tests/parity": (
        ["tests/parity/test_unet.py", "tests/parity/test_training.py", "tests/parity/test_loops.py", "-k", "triton"],
        ["tests/parity/test_loops.py", "-k", "reference and ddim and not slow"],
        8,
    ),
    "tests/training": (["tests/training/test_update.py", "-k", "gpu"], [], 16),
}
STOPPED = (124, 137, -9)
"""Exit statuses of ``timeout`` after it ended a command, in the end with SIGKILL."""
LEAST = 20
"""Seconds within which no stage is worth a start; none in a rehearsal."""
SETTINGS = """[pytest]
addopts = --import-mode=importlib
markers = slow
    timeout
"""


class Process:
    """A part that runs beside this process: its messages are received as they come, its other output goes to a log."""

    def __init__(self, check: "Check", *arguments: str) -> None:
        command = [sys.executable, "-m", "fastdiff.benchmarks.gpu_stages", *arguments, *["--rehearse"] * check.rehearse]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": check.log}
        self._what = " ".join(arguments)
        self._process = subprocess.Popen(command, cwd=ROOT, env=check.env, text=True, start_new_session=True, **pipes)
        self.ready, self.ended = threading.Event(), threading.Event()
        threading.Thread(target=self._read, args=(check,), daemon=True).start()

    def _read(self, check: "Check") -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    message = json.loads(line.removeprefix(MARK))
                    if "ready" in message:
                        self.ready.set()
                    check.receive(message)
                elif line.strip():
                    check.log.write(line)
            if self._process.wait() > 0:
                check.keep(
                    "process", self._what, f"ended with status {self._process.returncode}, see log.txt", failed=True
                )
        finally:
            if not self.ready.is_set():
                check.prepare_next()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]  # both are pipes
            self.ready.set()
            self.ended.set()

    def go(self) -> None:
        """Tell it to start its measurement."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended; the log says why
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal to it and to the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@dataclass
class Check:
    """A run: what is known so far, written as it comes."""

    out: Path
    scratch: Path
    end: float  # of time.monotonic()
    stages: Sequence[str]
    rehearse: bool
    log: TextIO
    env: Mapping[str, str]
    rows: list[dict[str, object]] = field(default_factory=list)
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    peak: float | None = None
    failed: bool = False
    wrong: list[str] = field(default_factory=list)
    tests: list["subprocess.Popen[str]"] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    models: dict[str, Process] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.end - time.monotonic()

    def receive(self, message: Mapping[str, Any]) -> None:
        """Keep what a process sends."""
        with self.lock:
            if rows := message.get("rows"):
                append_rows(self.out / "rows.csv", rows)
                self.rows += rows
            self.wrong += message.get("failed", [])
            self.failed |= bool(message.get("failed"))
            if "verdicts" in message:
                self.verdicts[message["of"]] = message["verdicts"]
            if "kernels" in message:
                with (self.out / "kernels.txt").open("a", encoding="utf-8") as file:
                    file.write(message["kernels"] + "\n\n")
            self.said += filter(None, [message.get("said")])
            self.advice = message.get("advice", self.advice)
            self.peak = message.get("peak", self.peak)
            self.summarise()
            if "ready" in message:
                self.prepare_next()

    def keep(self, workload: str, candidate: str, remark: str, failed: bool = False) -> None:
        """Keep a result without a time."""
        self.failed |= failed
        values = Row("gpu_check", workload, candidate, None, remark=remark).as_dict()
        self.receive({"rows": [{**values, **environment(torch.device("cpu" if self.rehearse else "cuda"))}]})

    def summarise(self) -> None:
        """Write the summary of all rows, on one page."""
        about = self.rows[-1] if self.rows else {}
        lines = [f"# GPU check of {about.get('gpu')}", ""]
        lines += [
            f"{about.get('date')}, PyTorch {about.get('torch')}, Triton {about.get('triton')}, {about.get('commit')}"
        ]
        lines += [*self.said, ""]
        results = [row for row in self.rows if row["suite"] == "gpu_check"]
        lines += [
            "## Correct",
            "",
            *(f"- {row['workload']}, {row['candidate']}: {row['remark']}" for row in results),
            "",
        ]
        models = [row for row in self.rows if row["suite"] in ("train", "step")]
        text = [{name: str(value) for name, value in row.items()} for row in models]
        self.verdicts["model"] = [
            str(one)
            for one in (
                *training_verdicts([row for row in text if row["suite"] == "train"], self.peak),
                *sampling_verdicts([row for row in text if row["suite"] == "step"]),
            )
        ]
        verdicts = [line for found in self.verdicts.values() for line in found]
        known = [line for line in verdicts if line.strip() and not line.startswith(" ")]
        lines += ["## Targets", "", *(f"- {line}" for line in known)]
        lines += [f"- not measured: {len(verdicts) - len(known)} of {len(verdicts)}", ""]
        lines += ["## Whole model", "", "| | | ms | |", "|---|---|---:|---|"]
        lines += [
            f"| {row['workload']} | {row['candidate']} | {1000 * float(str(row['median_s'])):.2f} | {row['remark']} |"
            for row in models
        ]
        lines += ["", "## Wrong or failed", "", *(f"- {line}" for line in self.wrong)]
        lines += ["", "## Faster divisions than the plans'", "", *(f"- {line}" for line in self.advice)]
        fresh = self.out / "summary.md.tmp"
        fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
        fresh.replace(self.out / "summary.md")

    def run(self) -> None:
        """All stages, each with its share of the time that is left."""
        self.pending = list(reversed(MODELS)) if "model" in self.stages else []
        cores = os.cpu_count() or 1
        at_once = max(1, cores // 4)
        for _ in range(at_once):
            self.prepare_next()
        for place, stage in enumerate(self.stages):
            rest = sum(STAGES[name] for name in self.stages[place:])
            seconds = self.left() * STAGES[stage] / rest
            if seconds < (0 if self.rehearse else LEAST):
                self.keep(stage, "stage", "not started: the time is up")
                continue
            print(f"{stage}: {seconds:.0f} s", flush=True)
            if stage == "model":
                self._model(time.monotonic() + seconds)
            else:
                {"correct": self._correct, "bars": self._bars, "sanitize": self._sanitize}[stage](seconds)
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        with self.lock:
            self.pending.clear()
            running = list(self.models.values())
        for process in running:
            process.signal(signal.SIGKILL)
        for tests in self.tests:
            if tests.poll() is None:
                os.killpg(tests.pid, signal.SIGKILL)

    def prepare_next(self) -> None:
        """Start the process of the next model, if one is left."""
        with self.lock:
            if self.pending:
                name = self.pending.pop()
                lock = str(self.scratch / "lock")
                self.models[name] = Process(self, "model", "--name", name, "--lock", lock)

    def _correct(self, seconds: float) -> None:
        """Run the tests of each folder, all folders at a time."""
        running = {
            name: self._pytest(name, arguments, seconds, share)
            for name, (on_gpu, rehearsed, share) in TESTS.items()
            if (arguments := rehearsed if self.rehearse else on_gpu)
        }
        codes = {name: process.wait() for name, process in running.items()}
        found = self._outcomes()
        for name, code in codes.items():
            mine = [one for one in found if one["test"].startswith(name)]
            counts = Counter(one["outcome"] for one in mine)
            failures = [one for one in mine if one["outcome"] == "failed"]
            stopped = ", stopped when its time was up" * (code in STOPPED)
            said = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped{stopped}"
            self.keep("correct", name, said, failed=bool(failures) or code not in (0, *STOPPED))
            for one in failures:
                self.keep("correct", one["test"], "failed, see failures.txt", failed=True)
                with (self.out / "failures.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{one['test']}\n{one['why']}\n\n")

    def _outcomes(self) -> list[dict[str, str]]:
        """What the tests reported since the last call."""
        report = self.scratch / "report"
        found = (
            [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.exists() else []
        )
        report.write_text("", encoding="utf-8")
        return found

    def _pytest(
        self, folder: str, arguments: Sequence[str], seconds: float, share: int, *before: str
    ) -> "subprocess.Popen[str]":
        settings = self.scratch / "pytest.ini"
        settings.write_text(SETTINGS, encoding="utf-8")
        workers = max(1, (os.cpu_count() or 1) // share)
        command = [*before, sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "fastdiff.benchmarks.gpu_report"]
        command += ["-c", str(settings), "--rootdir", str(ROOT), "--confcutdir", folder, "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark", *arguments]
        if find_spec("xdist") and workers > 1 and not before:
            command += ["-n", str(workers)]
        limited = ["timeout", "--kill-after=3", f"{max(1, seconds):.0f}", *command]
        env = {**self.env, "REPORT": str(self.scratch / "report")}
        pipes: dict[str, Any] = {"stdout": self.log, "stderr": self.log, "start_new_session": True}
        self.tests.append(subprocess.Popen(limited, cwd=ROOT, env=env, text=True, **pipes))
        return self.tests[-1]

    def _bars(self, seconds: float) -> None:
        process = Process(self, "bars", "--seconds", f"{seconds:.0f}")
        if not process.ended.wait(seconds + 15):
            process.signal(signal.SIGKILL)

    def _model(self, deadline: float) -> None:
        """Let one process after the other measure, while the others are stopped: they would keep the host busy."""
        measured: set[str] = set()
        while (left := deadline - time.monotonic()) > 0:
            with self.lock:
                waiting = {name: process for name, process in self.models.items() if name not in measured}
            if not waiting and not self.pending:
                break
            prepared = [name for name, process in waiting.items() if process.ready.is_set()]
            if not prepared:
                time.sleep(min(0.2, left))
                continue
            measuring = prepared[0]
            process = waiting.pop(measuring)
            measured.add(measuring)
            for other in waiting.values():
                other.signal(signal.SIGSTOP)
            process.go()
            if not process.ended.wait(max(1.0, deadline - time.monotonic())):
                self.keep("model", measuring, "stopped when its time was up")
            for other in waiting.values():
                other.signal(signal.SIGCONT)
        left_out = [name for name in MODELS if name not in measured]
        self.pending.clear()
        for name in left_out:
            self.keep("model", name, "not measured: the time is up")
        self.stop()

    def _sanitize(self, seconds: float) -> None:
        tool = shutil.which("compute-sanitizer")
        if tool is None and not self.rehearse:
            self.keep("sanitize", "memcheck", "not run: compute-sanitizer is not installed")
            return
        report = self.scratch / "memcheck"
        report.touch()
        before = ["env"] if tool is None else [tool, "--tool", "memcheck", "--log-file", str(report)]
        # one allocation per tensor, to see accesses beyond its end
        self.env = {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        smoke = ["tests/kernels/test_every_kernel.py"]
        code = self._pytest("tests/kernels", smoke, seconds, os.cpu_count() or 1, *before).wait()
        tests = len(self._outcomes())
        text = report.read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"^=+ +(Invalid .*|.* out of bounds.*|Misaligned .*)$", text, re.MULTILINE)
        for line in dict.fromkeys(found):
            self.keep("sanitize", "memcheck", line, failed=True)
        how = f"{tests} tests, {len(found)} errors" if tests else "no test ended"
        refused = "" if code in (0, 1, *STOPPED) else f"; it cannot run here (status {code})"
        self.keep("sanitize", "memcheck", how + ", stopped when its time was up" * (code in STOPPED) + refused)


def main() -> int:
    """Run the stages within the minutes, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="the budget (default: 8)")
    parser.add_argument("--only", choices=STAGES, help="one stage, with the whole budget")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU: small sizes, interpreted kernels, a GPU's double"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="the folder of the results")
    arguments = parser.parse_args()
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0):
        parser.error("--minutes must be a positive number")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU: --rehearse runs every stage on a CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if arguments.rehearse else {}
    stages = [arguments.only] if arguments.only else list(STAGES)
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch, (arguments.out / "log.txt").open("a", encoding="utf-8") as log:
        check = Check(arguments.out.resolve(), Path(scratch), end, stages, arguments.rehearse, log, env)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            check.run()
        finally:
            check.stop()
    print((check.out / "summary.md").read_text(encoding="utf-8"))
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
