"""How long a user waits for ``fastdiff train``: from the command to the first update, and how that time is spent."""

import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch

from fastdiff.benchmarks.child import child
from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.ladder import LONG
from fastdiff.benchmarks.rows import Row
from fastdiff.config import RuntimeConfig
from fastdiff.runtime.device import Runtime

_MODEL = ("--image-size", "32", "--num-channels", "64", "--learn-sigma", "--noise-schedule", "cosine")
_ONE_UPDATE = ("--batch-size", "16", "--steps", "1", "--preview-interval", "0")
_SAID = "32 pixels, 64 channels, batch 16"
_POLL_SECONDS = 0.005
_STAGES = (
    ("imports and reading the images", "log.txt", "  data: "),
    ("building the model", "log.txt", "  run: "),
    ("first update", "progress.jsonl", "\n"),
)
"""The stages of a run, each with the file of the run folder and the text in it that show that the stage is done."""


def measure_startup(images: Path, scratch: Path, rounds: int, device: torch.device, compiled: bool) -> list[Row]:
    """From the start of ``fastdiff train --steps 1`` on this folder to its update, with a cold cache and a warm one.

    The model is the small default one, and eager, as --compile auto selects for one step. With ``compiled``, and if
    PyTorch can compile, the same follows with --compile on: once with an empty compiler cache, then with a warm one.
    ``scratch`` holds the caches and the run folders.
    """
    workload = f"start-up, {sum(1 for _ in images.iterdir()):,} files: {_SAID}"
    of = _Start(images, scratch, device)
    rows = of.measured(f"{workload}, eager", "off", "first update, {} cache", rounds)
    if compiled and not rows[-1].failed and Runtime.resolve(RuntimeConfig(device=str(device))).compiles(LONG):
        rows += of.measured(f"{workload}, compiled", "on", "first update, compiled, {} cache", rounds)
    return rows


class _Start:
    def __init__(self, images: Path, scratch: Path, device: torch.device) -> None:
        paths = ["--data-dir", str(images), "--cache", "disk", "--cache-dir", str(scratch), "--device", str(device)]
        self._command = [sys.executable, "-m", "fastdiff", "train", *paths, *_MODEL, *_ONE_UPDATE]
        self._scratch = scratch
        self._env: Mapping[str, str] = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
        }

    def measured(self, workload: str, compile: str, label: str, rounds: int) -> list[Row]:
        """One run with a cold cache, then ``rounds`` with a warm one; one row without a time if a run fails."""
        try:
            cold = self._reached(compile, "cold")
            warm = [self._reached(compile, f"warm {i}") for i in range(rounds)]
        except ChildProcessError as error:
            return [Row("data", workload, label.format("cold"), None, remark=str(error), failed=True)]
        rows = []
        for cache, starts in (("cold", [cold]), ("warm", warm)):
            name = label.format(cache)
            timing = Timing(name, [reached[-1] for reached in starts], [float("nan")] * len(starts))
            spent = [[b - a for a, b in zip([0.0, *reached], reached, strict=False)] for reached in starts]
            medians = zip(_STAGES, zip(*spent, strict=True), strict=True)
            remark = ", ".join(f"{stage} {median(seconds):.1f} s" for (stage, _, _), seconds in medians)
            rows.append(Row("data", workload, name, timing, remark=remark))
        return rows

    def _reached(self, compile: str, name: str) -> list[float]:
        """The seconds until each stage was done; ChildProcessError with the run's last line if it ended early."""
        run_dir = self._scratch / f"compile {compile}, {name}"
        reached: list[float] = []
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            began = time.perf_counter()
            command = [*self._command, "--compile", compile, "--run-dir", str(run_dir)]
            with child(command, said, self._env) as process:
                while len(reached) < len(_STAGES):
                    ended = process.poll() is not None
                    _, name, text = _STAGES[len(reached)]
                    if (run_dir / name).exists() and text in (run_dir / name).read_text(encoding="utf-8"):
                        reached.append(time.perf_counter() - began)
                    elif ended:
                        said.seek(0)
                        last = said.read().strip().rpartition("\n")[2]
                        raise ChildProcessError(f"fastdiff train ended before its first update: {last}")
                    else:
                        time.sleep(_POLL_SECONDS)
                process.kill()  # its checkpoint is not needed
        return reached
