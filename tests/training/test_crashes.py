"""The crash matrix: saves that are killed, or fail, at each of their calls, and a run that is killed many times."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--short"], id="short"),
        pytest.param([], id="full", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="wants Linux and a C compiler")
def test_a_crash_leaves_whole_checkpoints_and_nothing_else(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "tests.training.crashes", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if not flags:
        with capfd.disabled():
            print(result.stdout)
