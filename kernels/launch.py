"""What the kernels share: their registration with PyTorch, and the launch.

Only files called kernel.py import this one: it needs Triton.
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
    """Within it kernels are not run: their launches are collected, to be compiled for GPUs that are not at hand."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, /, num_warps: int, num_stages: int, **arguments: Any
) -> None:
    """Run ``kernel`` with all its arguments given by name; ValueError where the grid is too large for a GPU."""
    for size, limit in zip(grid, GRID_LIMITS, strict=False):
        if size > limit:
            raise ValueError(f"{kernel.fn.__name__}: a grid of {grid} programs is over the GPU's limit {GRID_LIMITS}")
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, num_warps, num_stages))
    elif all(grid):
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)


def register(implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """``implementation`` as the PyTorch operator fastdiff::<its name>, opaque to torch.compile; ``fake`` makes its
    outputs for tracing, of the same shapes, dtypes and strides.

    Not torch.library.custom_op with register_autograd: per call that took 20 us here with gradients, this with a
    torch.autograd.Function around it 8 us. The Function stands beside each op's registration.
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
    """Multiprocessors (compute units) of the device; an H100's where launches are recorded, one where interpreted."""
    if device.type == "cuda":
        return _processors(device.index)
    return 1 if _recorded is None else 132
