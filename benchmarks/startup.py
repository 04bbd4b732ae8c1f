"""How long a user waits for ``fastdiff train``: from the command to the first update, and what that time goes into."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.rows import Row

_SMALL_MODEL = ("--image-size", "32", "--num-channels", "64", "--learn-sigma", "--noise-schedule", "cosine")
_ONE_UPDATE = ("--batch-size", "16", "--steps", "1", "--preview-interval", "0")
_POLL_SECONDS = 0.005
_STAGES = (
    ("reading the images", "log.txt", "  data: "),
    ("building the model", "log.txt", "  run: "),
    ("first update", "progress.jsonl", "\n"),
)
"""What a run does, and the file of its folder with the text by which one sees that it is done."""


def measure_startup(images: Path, scratch: Path, rounds: int) -> list[Row]:
    """From the start of ``fastdiff train --steps 1`` on this folder to its update, with a cold cache and a warm one.

    The model is the small default one, and eager, as --compile auto has it for one step: what compiling takes comes on
    top of it in a long run. ``scratch`` holds the cache and the run folders.
    """
    workload = f"start-up, {sum(1 for _ in images.iterdir()):,} files"
    try:
        cold = _start(images, scratch, scratch / "cold")
        warm = [_start(images, scratch, scratch / f"warm {i}") for i in range(rounds)]
    except ChildProcessError as error:
        return [Row("data", workload, "first update", None, remark=str(error), failed=True)]
    imports = median(_importing() for _ in range(rounds))
    rows = []
    for name, starts in (("first update, cold cache", [cold]), ("first update, warm cache", warm)):
        timing = Timing(name, [reached[-1] for reached in starts], [cold[-1]] * len(starts))
        data, *rest = (median(reached) for reached in zip(*starts, strict=True))
        spent = (imports, data - imports, *(later - sooner for sooner, later in zip([data, *rest], rest, strict=False)))
        stages = ("imports", *(stage for stage, _, _ in _STAGES))
        remark = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in zip(stages, spent, strict=True))
        rows.append(Row("data", workload, name, timing, remark=remark))
    return rows


def _start(images: Path, scratch: Path, run_dir: Path) -> list[float]:
    """The seconds until each of the stages was done; ChildProcessError with the run's last words where it ended."""
    paths = ["--data-dir", str(images), "--run-dir", str(run_dir), "--cache", "disk", "--cache-dir", str(scratch)]
    reached: list[float] = []
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        command = [sys.executable, "-m", "fastdiff", "train", *paths, *_SMALL_MODEL, *_ONE_UPDATE]
        with subprocess.Popen(command, stdout=said, stderr=said) as process:
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
            process.kill()  # what it would save is of no use
    return reached


def _importing() -> float:
    """The seconds until a new Python has imported what a training begins with."""
    command = "import os, fastdiff.cli.app, fastdiff.training; os._exit(0)"  # at once: PyTorch takes long to leave
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", command], check=True)
    return time.perf_counter() - began
