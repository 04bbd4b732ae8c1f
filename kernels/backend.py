"""The one place where an operation's implementation is chosen.

``reference`` is the definition: the original's operations in their order. ``torch`` is the best that stock PyTorch
offers. ``triton`` is this project's own kernel. ``auto`` is the fastest right one for device and shape. A backend that
is asked for by name never falls back to another.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor

Implementation = Callable[..., Tensor]


class Backend(StrEnum):
    """Which implementation of an operation runs."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"
    REFERENCE = "reference"


def choose(op: str, backend: Backend | str, implementations: Mapping[Backend, Implementation]) -> Implementation:
    """The implementation of ``op`` for ``backend``; ValueError where it has none."""
    try:
        backend = Backend(backend)
    except ValueError:
        raise ValueError(f"backend must be one of {', '.join(Backend)}, not {backend!r}") from None
    if backend is Backend.AUTO:
        backend = Backend.TORCH
    if backend not in implementations:
        have = ", ".join(implementations)
        raise ValueError(f"{op} has no {backend} implementation in this version: use auto or one of {have}")
    return implementations[backend]


def require(holds: bool, op: str, message: str, *values: Any) -> None:
    """ValueError that names the operation unless ``holds``; the message is only put together when it is needed."""
    if not holds:
        raise ValueError(f"{op}: {message.format(*values)}")
