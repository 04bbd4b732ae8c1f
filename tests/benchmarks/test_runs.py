"""What a benchmark starts ends with it; the start of a run and its stages."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fastdiff
from fastdiff.benchmarks import runs
from fastdiff.benchmarks.runs import child, measure_startup
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.signals import signals_as_exceptions

from ..processes import Job
from .support import CPU

WAITS = "import time, pathlib; pathlib.Path('ready').touch(); time.sleep(60)"
CLEANS_UP = f"""
import signal, sys
def leave(*_):
    pathlib.Path('cleaned').touch()
    sys.exit()
signal.signal(signal.SIGTERM, leave)
{WAITS}
""".replace("import signal", "import pathlib, signal", 1)
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAITS}"


def until(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("program", "status"), [(CLEANS_UP, 0), (DEAF, -signal.SIGKILL)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_error_ends_it_gently_then_by_force(
    program: str, status: int, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PATIENCE", 60 if program is CLEANS_UP else 0.2)
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]

    def interrupted() -> None:
        with (
            (tmp_path / "said").open("w+") as said,
            child([sys.executable, "-c", program], said, os.environ) as process,
        ):
            started.append(process)
            until(tmp_path / "ready")
            raise error

    started: list[subprocess.Popen[bytes]] = []
    with pytest.raises(error):
        interrupted()
    assert started[0].returncode == status
    assert (tmp_path / "cleaned").exists() == (program is CLEANS_UP)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_one_that_has_ended_is_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w+") as said:
        with child([sys.executable, "-c", "print('a'); raise SystemExit(3)"], said, os.environ) as process:
            assert process.wait() == 3
        said.seek(0)
        assert said.read() == "a\n"


PARENT = """
import os, sys, tempfile
from pathlib import Path
from fastdiff.benchmarks.runs import child
from fastdiff.runtime.signals import signals_as_exceptions
with signals_as_exceptions(), tempfile.TemporaryDirectory(dir=".") as folder, open("said", "w+") as said:
    with child([sys.executable, "-c", sys.argv[1]], said, os.environ) as process:
        Path("pid").write_text(str(process.pid))
        process.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_child_and_removes_the_folder(number: signal.Signals, tmp_path: Path) -> None:
    script, folder = tmp_path / "parent.py", tmp_path / "here"
    script.write_text(PARENT)
    folder.mkdir()
    parent = Job(script, [CLEANS_UP], cwd=folder)
    try:
        parent.wait_for(lambda: (folder / "ready").exists() and (folder / "pid").exists())
        parent.send_signal(number)
    finally:
        status = parent.finish().status
    assert status == 128 + number
    assert_nothing_is_left(folder)


def test_an_interrupt_does_so_too(tmp_path: Path) -> None:
    """In an interpreter of its own, which ends by it."""
    root = str(Path(fastdiff.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PARENT, CLEANS_UP]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL) as parent:
        try:
            until(tmp_path / "ready")
            until(tmp_path / "pid")
            parent.send_signal(signal.SIGINT)
            status = parent.wait(60)
        finally:
            parent.kill()
    assert status == -signal.SIGINT
    assert_nothing_is_left(tmp_path)


def assert_nothing_is_left(folder: Path) -> None:
    """Neither the child nor the temporary folder."""
    assert {path.name for path in folder.iterdir()} == {"said", "pid", "ready", "cleaned"}
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_exceptions():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_compiled_starts_have_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"off": [1.0, 1.0, 2.0], "on": [1.0, 1.0, 7.0]}
    seen = []

    def start(flags: Mapping[str, Any], scratch: Path, name: str) -> list[float]:
        seen.append((flags["compile"], name))
        return spent[flags["compile"]]

    monkeypatch.setattr(runs, "_start", start)
    monkeypatch.setattr(Runtime, "compiles", lambda *_: True)
    rows = measure_startup(tmp_path, tmp_path, 2, CPU, compiled=True)
    assert seen == [(how, f"compile {how}, {i}") for how in ("off", "on") for i in range(3)]
    assert [(row.workload.rpartition(", ")[2], row.candidate, row.timing and row.timing.median) for row in rows] == [
        ("eager", "first update, cold cache", 4.0),
        ("eager", "first update, warm cache", 4.0),
        ("compiled", "first update, compiled, cold cache", 9.0),
        ("compiled", "first update, compiled, warm cache", 9.0),
    ]
    assert rows[0].remark == "imports and reading the images 1.0 s, building the model 1.0 s, first update 2.0 s"
    monkeypatch.setattr(Runtime, "compiles", lambda *_: False)  # without a compiler
    assert len(measure_startup(tmp_path, tmp_path, 2, CPU, compiled=True)) == 2


@pytest.mark.slow
def test_a_start_that_fails_is_a_row_without_a_time(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (row,) = measure_startup(tmp_path / "images", tmp_path / "scratch", 1, CPU, compiled=True)
    assert row.timing is None
    assert row.failed
    assert row.remark.startswith("fastdiff train ended before its first update: error: no images in data_dir ")
