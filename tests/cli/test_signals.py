"""Ctrl-C and SIGTERM, as a person and a cluster send them."""

import re
import signal
from pathlib import Path

import pytest

from .conftest import Cli
from .support import SHORT, TINY, finish, start, succeeded


@pytest.mark.timeout(240)
def test_a_stopped_training_is_saved_and_goes_on(shapes: Path, tmp_path: Path, train: Cli) -> None:
    signals = {"int": signal.SIGINT, "term": signal.SIGTERM}
    flags = ["--data-dir", str(shapes), *TINY, "--class-cond", *SHORT, "--steps", "1000000", "--log-interval", "5"]
    processes = {name: start("train", "--run-dir", name, *flags, cwd=tmp_path) for name in signals}
    results = {}
    try:
        for name, process in processes.items():
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step "):
                    break
            process.send_signal(signals[name])
            results[name] = finish(process)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert {name: result.status for name, result in results.items()} == {"int": 130, "term": 143}
    for name, result in results.items():
        assert result.err.strip().startswith("stopping and saving"), result.err
        found = re.search(r"stopped by SIG\w+ at step (\d+)", result.out)
        assert found, result.out
        step = int(found[1])
        assert (tmp_path / name / f"opt{step:06d}.safetensors").exists()
        assert re.search(rf"go on with: fastdiff train .*--run-dir {name} --resume", result.out)
        again = succeeded(train(name, "--resume", "--steps", step + 1))
        assert f"resumed at step {step}\n" in again.out
        assert (tmp_path / name / f"model{step + 1:06d}.safetensors").exists()
