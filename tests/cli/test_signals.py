"""Ctrl-C and SIGTERM, as a person and a cluster send them."""

import re
import signal
from pathlib import Path

import pytest

from ..processes import Job
from ..sampling.support import saved
from .conftest import Cli
from .support import PLAIN, SHORT, TINY, contents, start, succeeded


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


@pytest.mark.slow
def test_the_first_step_of_sampling_may_compile_and_is_interrupted(checkpoint: Path, tmp_path: Path) -> None:
    """For minutes, in which no step would look at the signal."""
    slow = (
        "import time\n"
        "from fastdiff.sampling import Loop\n"
        "def step(self):\n"
        "    print('compiling now', flush=True)\n"
        "    time.sleep(60)\n"
        "Loop.step = step\n"
    )
    process = start("sample", str(checkpoint), *PLAIN, "--steps", "2", cwd=tmp_path, before=slow)
    assert process.stdout is not None
    while "compiling now" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert not (tmp_path / "samples.npz").exists()


@pytest.mark.slow
def test_the_first_step_of_a_likelihood_may_compile_and_is_interrupted(shapes: Path, tmp_path: Path) -> None:
    """It says so before."""
    slow = (
        "import time\n"
        "from fastdiff.runtime.device import Runtime\n"
        "Runtime.compiles = lambda self, calls: True\n"
        "def compiled(*_, **__):\n"
        "    print('now', flush=True)\n"
        "    time.sleep(60)\n"
        "Runtime.prepare = lambda self, model, calls: compiled\n"
    )
    flags = ["--data-dir", str(shapes), *PLAIN, "--steps", "2"]
    process = start("evaluate", "nll", str(saved(tmp_path / "a.safetensors")), *flags, cwd=tmp_path, before=slow)
    assert process.stdout is not None
    told = ""
    while not told.endswith("now\n"):
        assert process.poll() is None
        told += process.stdout.readline()
    assert "compiling the model first" in told
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert not (tmp_path / "nll").exists()


def test_a_compilation_before_training_is_interrupted_and_nothing_is_lost(
    shapes: Path, tmp_path: Path, train: Cli
) -> None:
    slow = (
        "import time\n"
        "from fastdiff.runtime.device import Runtime\n"
        "from fastdiff.training import trainer\n"
        "Runtime.compiles = lambda self, calls: True\n"
        "Runtime.prepare = lambda self, model, calls: self.eager(model)\n"
        "trainer.warm_up = lambda *_: time.sleep(60)\n"
    )
    flags = ["--data-dir", str(shapes), *TINY, "--class-cond", *SHORT, "--log-interval", "1"]
    run_dir = tmp_path / "run"

    def interrupted(*more: str) -> None:
        process = start("train", *flags, "--run-dir", str(run_dir), *more, cwd=tmp_path, before=slow)
        assert process.stdout is not None
        while "compiling" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, ""), out
        assert "step" not in out

    interrupted("--steps", "1")
    succeeded(train(run_dir, "--steps", 1))  # nothing is there that it would have to resume
    before = contents(run_dir)
    interrupted("--steps", "2", "--resume")
    assert contents(run_dir) == before
    assert "resumed at step 1\n" in succeeded(train(run_dir, "--resume", "--steps", 2)).out
