"""Commands as processes of their own that start in a tenth of a second: forked from one that has imported PyTorch.

A new interpreter takes seconds for that, each of several processes again, and torchrun itself once more. What is shown
is the same, except where a test is about torchrun or about the start of an interpreter: those start real ones.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

_CHILD = Path(__file__).with_name("child.py")
_ROOT = Path(__file__).parents[1]

FORKSERVER = multiprocessing.get_context("forkserver")
_PRELOADED = ("cli.app", "cli.display", "training", "sampling", "evaluation.nll", "benchmarks.data")
_LIBRARIES = (
    *("torch._dynamo", "torch.distributed.fsdp"),
    *("pydantic.main", "pydantic.fields", "pydantic.type_adapter", "typer._adapters"),
    *("rich.progress", "rich._emoji_codes"),
)
FORKSERVER.set_forkserver_preload([*(f"fastdiff.{name}" for name in _PRELOADED), *_LIBRARIES])


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str


class Job:
    """One process that runs a script, or several that are the ranks of a job.

    As under torchrun the first one that fails ends the others, and the status of several is 0 or 1; a process that a
    signal killed has its negative number.
    """

    def __init__(
        self,
        script: Path | None,
        args: Sequence[object],
        cwd: Path,
        environment: Mapping[str, object] | None = None,
        processes: int = 1,
    ) -> None:
        """Start it: ``script`` or, without one, ``fastdiff`` with the arguments ``args``."""
        self._out, self._err = (tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2))  # noqa: SIM115
        self._ranks = []
        port = _free_port()
        for rank in range(processes):
            place: dict[str, object] = {}
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables = {**os.environ, "PYTHONPATH": str(_ROOT), **place, **(environment or {})}
            request = {
                "script": script and str(script),
                "args": list(map(str, args)),
                "cwd": str(cwd),
                "environment": {name: str(value) for name, value in variables.items()},
                "out": self._out.name,
                "err": self._err.name,
            }
            process = FORKSERVER.Process(target=runpy.run_path, args=(str(_CHILD), {"REQUEST": request}, "__main__"))
            process.start()
            self._ranks.append(process)

    @property
    def pid(self) -> int:
        """Of the only process."""
        (process,) = self._ranks
        assert process.pid is not None
        return process.pid

    def send_signal(self, number: int) -> None:
        """To the only process."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The status, once it has ended."""
        if any(process.exitcode is None for process in self._ranks):
            return None
        if len(self._ranks) > 1:
            return int(any(process.exitcode for process in self._ranks))
        return self._ranks[0].exitcode

    @property
    def out(self) -> str:
        """What was written to stdout so far."""
        return _read(self._out)

    def wait_for(self, holds: Callable[[], bool], timeout: float = 300) -> None:
        """Wait while it runs until something holds; AssertionError where it ends before."""
        deadline = time.monotonic() + timeout
        while not holds():
            assert self.poll() is None, self.finish()
            assert time.monotonic() < deadline, self.out
            time.sleep(0.01)

    def finish(self, timeout: float = 300) -> Result:
        """Wait for it; TimeoutError where it does not end."""
        deadline = time.monotonic() + timeout
        try:
            while self.poll() is None:
                running = [process for process in self._ranks if process.exitcode is None]
                if len(running) < len(self._ranks) and any(process.exitcode for process in self._ranks):
                    for process in running:
                        process.terminate()
                if not wait([process.sentinel for process in running], max(deadline - time.monotonic(), 0)):
                    raise TimeoutError(f"it runs for more than {timeout} s:\n{self.out}\n{_read(self._err)}")
            status = self.poll()
            assert status is not None
            return Result(status, self.out, _read(self._err))
        finally:
            self.kill()

    def kill(self) -> None:
        """End it now; what it wrote is gone with it."""
        for process in self._ranks:
            process.kill()
            process.join()
        self._out.close()
        self._err.close()


def script(text: str, **names: object) -> tuple[BaseProcess, Connection]:
    """A process that executes ``text`` with these names, and the other end of its ``channel``."""
    ours, theirs = FORKSERVER.Pipe()
    process = FORKSERVER.Process(target=exec, args=(text, {"channel": theirs, **names}))
    process.start()
    theirs.close()
    return process, ours


def launch(
    script: Path,
    args: Sequence[object],
    cwd: Path,
    environment: Mapping[str, object],
    processes: int = 1,
    torchrun: Sequence[str] | None = None,
) -> Result:
    """Run ``script`` to its end, forked, or by ``torchrun`` with these flags."""
    if torchrun is None:
        return Job(script, args, cwd, environment, processes).finish()
    run = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", *torchrun]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    variables = {**outside, "PYTHONPATH": _ROOT, "OMP_NUM_THREADS": 1, **environment}
    process = subprocess.Popen(
        [sys.executable, *run, *map(str, (script, *args))],
        cwd=cwd,
        env={name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return finish(process)


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a process with pipes."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
