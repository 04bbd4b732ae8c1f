"""A GPU's double for rehearsals: PyTorch's interface to CUDA on a CPU, so that no line runs first on a GPU."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from fastdiff.benchmarks import harness, roofline


class Event:
    """A moment."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: object = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return (other.time - self.time) * 1000


class CUDAGraph:
    """Nothing is captured: replaying it would compute what is in no tensor, so it does nothing but count."""

    replays = 0

    def replay(self) -> None:
        CUDAGraph.replays += 1


DOUBLES: dict[str, Any] = {
    "Event": Event,
    "Stream": lambda device=None: SimpleNamespace(),
    "CUDAGraph": CUDAGraph,
    "stream": nullcontext,
    "graph": lambda graph, stream=None: nullcontext(),
    "current_stream": lambda device=None: SimpleNamespace(),
    "synchronize": lambda device=None: None,
    "_sleep": lambda cycles: None,
    "set_sync_debug_mode": lambda mode: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 2**20,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: "none (a rehearsal)",
}


@contextmanager
def rehearsed() -> Iterator[None]:
    """The benchmarks take the CPU for a GPU, and its ceilings are measured in no time."""
    little: dict[str, Any] = {"ENOUGH": {"cpu": 1e6}, "SIDE": {"cpu": 64}, "FILLING": {"cpu": 2**20}}
    changes: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, DOUBLES),
        (harness, {"on_gpu": lambda device: True}),
        (roofline, little),
    ]
    with ExitStack() as stack:
        for module, doubles in changes:
            for name, double in doubles.items():
                stack.enter_context(patch.object(module, name, double))
        yield
