"""Ctrl-C and SIGTERM, as a person and a cluster send them."""

import re
import signal
from pathlib import Path

from ..processes import Job
from .conftest import Cli
from .support import SHORT, TINY, succeeded


def test_a_stopped_training_is_saved_and_goes_on(shapes: Path, tmp_path: Path, train: Cli) -> None:
    signals = {"int": signal.SIGINT, "term": signal.SIGTERM}
    flags = ["--data-dir", shapes, *TINY, "--class-cond", *SHORT, "--steps", 1000000, "--log-interval", 5]
    results = {}
    for name, number in signals.items():
        job = Job(None, ["train", "--run-dir", name, *flags], cwd=tmp_path)
        job.wait_for(lambda job=job: "\nstep " in job.out)
        job.send_signal(number)
        results[name] = job.finish()
    assert {name: result.status for name, result in results.items()} == {"int": 130, "term": 143}
    for name, result in results.items():
        assert result.err.strip().startswith("stopping and saving"), result.err
        found = re.search(r"stopped by SIG\w+ at step (\d+)", result.out)
        assert found, result.out
        step = int(found[1])
        assert (tmp_path / name / f"opt{step:06d}.safetensors").exists()
        assert re.search(rf"resume with: fastdiff train .*--run-dir {name} --resume", result.out)
        again = succeeded(train(name, "--resume", "--steps", step + 1))
        assert f"resumed at step {step}\n" in again.out
        assert (tmp_path / name / f"model{step + 1:06d}.safetensors").exists()
