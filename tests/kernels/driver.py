"""A driver's double: kernels compile for an H100, and what would be launched is kept. For a process of its own."""

from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget

launched: list[tuple[str, tuple[int, ...], list[Any]]] = []
"""Name, grid and arguments, tensors as their addresses."""


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        _, _, _, _, _, _, *arguments = rest  # stream, function, metadata twice, hooks
        launched.append((self.name, (x, y, z), addresses_in(arguments)))


def addresses_in(arguments: Any) -> list[Any]:
    """The arguments, tuples as lists, and tensors as their addresses."""
    return [
        addresses_in(a) if isinstance(a, (tuple, list)) else a.data_ptr() if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


class Idle:
    """A launcher that keeps nothing, so that only the way to it is timed."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class Utils:
    properties: ClassVar = {
        "max_shared_mem": 232448,
        "max_num_regs": 65536,
        "multiprocessor_count": 132,
        "warpSize": 32,
    }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024


class Driver:
    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> None:
        return None

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(keep: bool = True) -> None:
    """Let Triton launch on the double, which keeps what would be launched if ``keep``."""
    double = Driver()
    if not keep:
        double.launcher_cls = Idle  # type: ignore[assignment]
    triton.runtime.driver.set_active(double)
