"""Running the command line, and what it must do with bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fastdiff

from ..processes import Result

TINY = [
    *("--image-size", "8", "--num-channels", "32", "--num-res-blocks", "1", "--channel-mult", "1"),
    *("--attention-resolutions", "", "--diffusion-steps", "20", "--noise-schedule", "cosine"),
]
"""A model and a process that train in no time."""

PLAIN = ["--compile", "off", "--precision", "fp32", "--device", "cpu"]
"""The arithmetic of the tests."""

SHORT = ["--batch-size", "4", "--preview-interval", "0", *PLAIN, "--recipe", "improved"]
"""A training that does not take long, by improved-diffusion's settings."""


def refused(result: Result, *patterns: str) -> None:
    """Bad input: exit status 2 and one line on stderr in which every pattern is found."""
    assert result.status == 2, result
    assert "Traceback" not in result.out + result.err
    assert re.fullmatch(r"[^\n]+\n", result.err), f"not one line:\n{result.err}"
    for pattern in patterns:
        assert re.search(pattern, result.err), f"no {pattern!r} in {result.err!r}"


def succeeded(result: Result) -> Result:
    """Exit status 0 and nothing on stderr."""
    assert (result.status, result.err) == (0, ""), result
    return result


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the log, to see that nothing was lost."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log.txt"
    }


def start(*args: str, cwd: Path, before: str = "") -> subprocess.Popen[str]:
    """``fastdiff`` as a process of its own, after a line of Python."""
    root = str(Path(fastdiff.__file__).parents[1])  # where the tests themselves find it, installed or not
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\nfrom fastdiff.cli.app import main\nmain()", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
