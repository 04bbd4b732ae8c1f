"""Ctrl-C, SIGTERM and a closed terminal: a wish that a loop reads at a step's end, or an exception that cleans up."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Self

from fastdiff.runtime.distributed import launcher

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

_PROMISE = "stopping and saving after this step; once more stops at once, without saving"


class StopRequest:
    """While entered, the first signal is kept in ``received``; a second one of its kind acts as it always does.

    Not so in a process that torchrun started: there the second one is torchrun's, which hands on what it got itself and
    has a time-out of its own.
    """

    def __init__(self, promise: str = _PROMISE) -> None:
        """``promise`` is what the first signal is answered with."""
        self.received: signal.Signals | None = None
        self._answer = f"\n{promise}\n".encode()
        self._before: dict[signal.Signals, object] = {}
        self._handed_on = launcher() != ""

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only, and lets no other one ask for them
        for kind in _SIGNALS:
            if signal.getsignal(kind) is signal.SIG_IGN:
                continue  # nohup's wish
            self._before[kind] = signal.signal(kind, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned it takes back

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._handed_on:
            return
        with contextlib.suppress(OSError):  # print is not safe in a signal handler
            os.write(2, self._answer)
        signal.signal(number, self._before[self.received])  # type: ignore[arg-type]


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and a closed terminal as SystemExit, which cleans up as Ctrl-C does; what nohup ignores stays so."""

    def leave(number: int, frame: FrameType | None) -> None:
        for kind in before:
            signal.signal(kind, signal.SIG_IGN)  # which often come together, and would cut the cleaning up short
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        kinds = (kind for kind in _SIGNALS if kind != signal.SIGINT)
        before = {kind: handler for kind in kinds if (handler := signal.getsignal(kind)) is not signal.SIG_IGN}
    for kind in before:
        signal.signal(kind, leave)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
