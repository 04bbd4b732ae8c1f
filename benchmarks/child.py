"""Child processes of a benchmark. They always end before the benchmark does, and before their folder is removed."""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

PATIENCE = 35.0
"""Seconds between SIGTERM and SIGKILL: torchrun gives its workers 30 s, and no other process knows the workers."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def child(command: Sequence[str], output: IO[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that writes only to ``output``. It and the processes it started have ended when the context exits.

    It runs in a new session, so that Ctrl-C reaches it only from here, once.
    """
    process = subprocess.Popen(command, stdout=output, stderr=output, env=env, start_new_session=True)
    try:
        yield process
    finally:
        with _uninterrupted():
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    process.kill()
    process.wait()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore further signals while the first one is handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, *_SIGNALS)
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
