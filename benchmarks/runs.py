"""``fastdiff train`` in child processes: the wait for its first update, and the images/s of one process and of two."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import IO

import torch

from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.ladder import LONG
from fastdiff.benchmarks.rows import Row
from fastdiff.benchmarks.workload import Workload
from fastdiff.config import RuntimeConfig
from fastdiff.data.shapes import write_shapes
from fastdiff.runtime.device import Runtime

PATIENCE = 35.0
"""Seconds between SIGTERM and SIGKILL: torchrun gives its workers 30 s, and no other process knows the workers."""

SMALL = {"image_size": 32, "num_channels": 64, "learn_sigma": True, "noise_schedule": "cosine", "batch_size": 16}
"""The flags of the run whose start is measured: the small default model."""

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_POLL_SECONDS = 0.005
_STAGES = (
    ("imports and reading the images", "log.txt", "  data: "),
    ("building the model", "log.txt", "  run: "),
    ("first update", "progress.jsonl", "\n"),
)
"""The stages of a run, each with the file of the run folder and the text in it that show that the stage is done."""


def alone(name: str, seconds: Sequence[float]) -> Timing:
    """A timing without a speedup, because the candidates do not take turns."""
    return Timing(name, seconds, [math.nan] * len(seconds))


@contextmanager
def child(command: Sequence[str], output: IO[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that writes only to ``output``. It and the processes it started have ended when the context exits.

    It runs in a new session, so that Ctrl-C reaches it only from here, once.
    """
    process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        yield process
    finally:
        before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in _SIGNALS}  # the first signal is being handled
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _training(
    flags: Mapping[str, object], env: Mapping[str, str], launcher: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """A run of ``fastdiff train``, started by the module ``launcher`` if given, and the file with its output."""
    command = [sys.executable, *launcher, "-m", "fastdiff", "train", "--preview_interval", "0"]
    for name, value in flags.items():
        if value is not None:
            command += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said, child(command, said, env) as process:
        yield process, said


def error_in(said: IO[str]) -> str:
    """A run's first line with an error message, else the last line of its output, without torchrun's lines of =."""
    said.seek(0)
    lines = [text for line in said if (text := line.strip(" =\n"))] or ["fastdiff train printed nothing"]
    return next((line for line in lines if "error: " in line.lower()), lines[-1])


def measure_startup(images: Path, scratch: Path, rounds: int, device: torch.device, compiled: bool) -> list[Row]:
    """From the start of ``fastdiff train --steps 1`` on this folder to its update, with a cold cache and a warm one.

    The model is the small default one, and eager, as --compile auto selects for one step. With ``compiled``, and if
    PyTorch can compile, the same follows with --compile on: once with an empty compiler cache, then with a warm one. A
    run that fails ends it with a row without a time. ``scratch`` holds the caches and the run folders.
    """
    about = f"start-up, {sum(1 for _ in images.iterdir()):,} files: 32 pixels, 64 channels, batch 16"
    flags = SMALL | {"steps": 1, "data_dir": images, "cache": "disk", "cache_dir": scratch, "device": device}
    ways = [("off", "eager", "first update")]
    if compiled and Runtime.resolve(RuntimeConfig(device=str(device))).compiles(LONG):
        ways.append(("on", "compiled", "first update, compiled"))
    rows: list[Row] = []
    for compile, how, first in ways:
        blank = Row("data", f"{about}, {how}", f"{first}, cold cache", None)
        flags["compile"] = compile
        try:
            starts = [_start(flags, scratch, f"compile {compile}, {i}") for i in range(1 + rounds)]
        except ChildProcessError as error:
            return [*rows, replace(blank, remark=str(error), failed=True)]
        for name, found in ((blank.candidate, starts[:1]), (f"{first}, warm cache", starts[1:])):
            stages = zip(_STAGES, zip(*found, strict=True), strict=True)
            remark = ", ".join(f"{stage} {median(seconds):.1f} s" for (stage, _, _), seconds in stages)
            timing = alone(name, [sum(seconds) for seconds in found])
            rows.append(replace(blank, candidate=name, timing=timing, remark=remark))
    return rows


def _start(flags: Mapping[str, object], scratch: Path, name: str) -> list[float]:
    """The seconds that each stage took; ChildProcessError with the run's error message if it ended early."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "TRITON_CACHE_DIR": str(scratch / "triton")}
    spent: list[float] = []
    began = time.perf_counter()
    with _training({**flags, "run_dir": scratch / name}, os.environ | caches) as (process, said):
        while len(spent) < len(_STAGES):
            ended = process.poll() is not None
            _, file, text = _STAGES[len(spent)]
            path = scratch / name / file
            if path.exists() and text in path.read_text(encoding="utf-8"):
                spent.append(time.perf_counter() - began - sum(spent))
            elif ended:
                raise ChildProcessError(f"fastdiff train ended before its first update: {error_in(said)}")
            else:
                time.sleep(_POLL_SECONDS)
        process.kill()  # its checkpoint is not needed
    return spent


def measure_processes(workload: Workload, config: RuntimeConfig, quick: bool) -> list[Row]:
    """The trainer's images/s in one process and in two, started by torchrun, on a few generated images.

    On a CPU the processes share the cores; on GPUs each process has one, if there are enough. The total batch size is
    the same.
    """
    on_cpu = workload.device.type == "cpu"
    workload = replace(workload, batch_size=max(2, workload.batch_size // 2 * 2))
    shared = "they share the cores" if on_cpu else "a GPU each"
    rows: list[Row] = []
    medians: list[float] = []
    for processes in (1, 2) if on_cpu or torch.cuda.device_count() > 1 else (1,):
        name = f"{processes} process{'es' * (processes > 1)}"
        row = Row("growth", f"training by processes: {workload}", name, None, images=workload.batch_size)
        try:
            seconds, peak = _updates(workload, config, processes, quick)
        except OSError as error:
            return [*rows, replace(row, remark=str(error), failed=True)]
        medians.append(median(seconds))
        times = f"{medians[0] / medians[-1]:.2f}× of 1 process; {shared}; memory of the first process"
        rows.append(replace(row, timing=alone(name, seconds), peak_gib=peak, remark=times * (processes > 1)))
    return rows


def _updates(workload: Workload, config: RuntimeConfig, processes: int, quick: bool) -> tuple[list[float], float]:
    """Seconds per update for each line of the log, and peak GiB; ChildProcessError with the run's error message."""
    interval, lines = (1, 3) if quick else (5, 5)
    env = dict(os.environ)
    if workload.device.type == "cpu":
        env["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    with tempfile.TemporaryDirectory() as folder:
        images, run_dir = Path(folder, "images"), Path(folder, "run")
        write_shapes(images, 64, workload.model.image_size, seed=0)
        flags = workload.model.to_dict() | workload.diffusion.to_dict() | config.to_dict()
        flags |= {"num_classes": None}  # the data determines it
        flags |= {"device": workload.device.type, "data_dir": images, "run_dir": run_dir, "cache": "memory"}
        flags |= {"batch_size": workload.batch_size, "steps": interval * (lines + 1), "log_interval": interval}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with _training(flags, env, [*launcher, "--log-dir", f"{folder}/torchrun"]) as (process, said):
            if process.wait():
                raise ChildProcessError(error_in(said))
        with (run_dir / "progress.jsonl").open(encoding="utf-8") as file:
            _, *seen = [json.loads(line) for line in file]  # the first interval includes the warm-up
    return [workload.batch_size / line["images_per_s"] for line in seen], max(line["memory_gib"] for line in seen)
