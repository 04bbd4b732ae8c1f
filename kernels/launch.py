"""Registration of the kernels with PyTorch, and their launch.

Within kernels/ only files named kernel.py import this module, because it needs Triton.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: its arguments by name, compile-time constants included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running kernels, so that they can be compiled for GPUs that are not available."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, /, num_warps: int, num_stages: int, **arguments: Any
) -> None:
    """Run ``kernel`` with all arguments passed by name; ValueError if the grid is too large for a GPU."""
    for size, limit in zip(grid, GRID_LIMITS, strict=False):
        if size > limit:
            raise ValueError(f"{kernel.fn.__name__}: a grid of {grid} programs exceeds the GPU's limit {GRID_LIMITS}")
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps, num_stages))
    elif all(grid):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def register(implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``implementation`` as the PyTorch operator fastdiff::<its name>, which is opaque to torch.compile.

    ``fake`` creates outputs of the same shapes, dtypes and strides for tracing. A torch.autograd.Function around the
    operator, next to its registration, defines the gradient. This takes 8 us per call with gradients;
    torch.library.custom_op with register_autograd took 20 us.
    """
    name = f"fastdiff::{implementation.__name__}"
    schema = torch.library.infer_schema(implementation, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(name, ("CPU", "CUDA"), implementation)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.fastdiff, implementation.__name__).default


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device; an H100's if launches are recorded, one if interpreted."""
    if device.type == "cuda":
        return _processors(device.index)
    return 1 if _recorded is None else 132
