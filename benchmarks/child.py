"""Processes that a benchmark starts: whichever way it ends, they end before it, and before their folder is removed."""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

PATIENCE = 35.0
"""Seconds between SIGTERM and the end by force: torchrun gives its workers 30 of them, and nobody else knows them."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def child(command: Sequence[str], output: IO[str], env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended, with what it started itself, when this is left; it writes to ``output`` alone.

    It has a session of its own, so that Ctrl-C reaches it only from here, once.
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
    """No second signal while the first one's work is done."""
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
