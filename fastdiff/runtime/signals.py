"""Ctrl-C, SIGTERM and SIGHUP: as a stop request that a loop checks after each step, or as an exception."""

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
    """While entered, stores the first signal in ``received``; a second signal of the same kind has its usual effect.

    Under torchrun a second signal has no effect: torchrun forwards the signals that it receives itself, and has its own
    timeout.
    """

    def __init__(self, promise: str = _PROMISE) -> None:
        """``promise`` is the line printed on the first signal."""
        self.received: signal.Signals | None = None
        self._answer = f"\n{promise}\n".encode()
        self._before: dict[signal.Signals, object] = {}
        self._handed_on = launcher() != ""

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows signal handlers in the main thread only
        for kind in _SIGNALS:
            if signal.getsignal(kind) is signal.SIG_IGN:
                continue  # set by nohup
            self._before[kind] = signal.signal(kind, self._receive)
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While entered, a signal has its usual effect: what runs here, such as compilation, asks for no stop."""
        handlers = {kind: signal.signal(kind, before) for kind, before in self._before.items()}  # type: ignore[arg-type]
        try:
            yield
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # signal.signal accepts what it returned

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self._handed_on:
            return
        with contextlib.suppress(OSError):  # print is not safe in a signal handler
            os.write(2, self._answer)
        signal.signal(number, self._before[self.received])  # type: ignore[arg-type]


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that cleanup runs as after Ctrl-C; ignored signals stay ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        for kind in before:
            signal.signal(kind, signal.SIG_IGN)  # they often arrive together and would interrupt the cleanup
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
