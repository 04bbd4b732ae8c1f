"""Choose the implementation of an operation; no other file does.

``reference`` is the definition: the original operations in their order. ``torch`` is the best of stock PyTorch.
``triton`` is this project's kernel. ``auto`` selects the fastest correct implementation for the device and shape. An
explicitly requested backend never falls back to another.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Implementation = Callable[..., Any]

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels, on any device. Read once, as Triton itself does."""


HAVE_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))
"""Device types with autocast. Queried once, because PyTorch 2.11 cannot trace the query. The meta device has none."""


class Backend(StrEnum):
    """Which implementation of an operation runs."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"
    REFERENCE = "reference"


def choose(
    op: str,
    backend: Backend | str,
    implementations: Mapping[Backend, Implementation],
    x: Tensor,
    refusal: str = "",
    wins: bool = True,
) -> Implementation:
    """Return the implementation of ``op`` for ``backend`` and the main input ``x``; ValueError if it cannot run.

    ``refusal`` is the reason why the kernels cannot run these arguments, empty if they can. ``wins`` tells whether the
    kernels are the fastest implementation for them on a GPU. Both affect only ``triton`` and ``auto``.
    """
    try:
        backend = Backend(backend)
    except ValueError:
        raise ValueError(f"backend must be one of {', '.join(Backend)}, not {backend!r}") from None
    if backend is Backend.AUTO:
        ours = x.device.type == "cuda" and wins and not (refusal or _refusal(x))
        backend = Backend.TRITON if ours and Backend.TRITON in implementations else Backend.TORCH
    elif backend is Backend.TRITON:
        refusal = refusal or _refusal(x)
        if refusal:
            raise ValueError(f"{op}: backend triton {refusal}; use auto or torch")
    return implementations[backend]


def runs_triton(backend: Backend | str, x: Tensor) -> bool:
    """Whether an operation that supports all of its arguments would run as this project's kernel."""
    if backend == Backend.AUTO:
        return x.device.type == "cuda" and not _refusal(x)
    return backend == Backend.TRITON


def _refusal(x: Tensor) -> str:
    """The reason why no kernel supports ``x``, or an empty string."""
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"needs a GPU, but the tensor is on {x.device.type} (TRITON_INTERPRET=1 interprets it there, slowly)"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"computes in fp32, fp16 and bf16, not in {x.dtype}"
    if x.dtype is torch.bfloat16 and x.device.type == "cuda" and not _has_bf16(x.device):
        return "needs a GPU of compute capability 8.0 for bf16; use fp16 there"
    return ""


def _has_bf16(device: torch.device) -> bool:
    # torch.compile evaluates this query, unlike the others, to a constant
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context that disables autocast on the device of ``x``."""
    if torch.compiler.is_compiling():
        import fastdiff.kernels.graph_cache  # noqa: F401  # imports the compiler, which takes two seconds
    return torch.autocast(x.device.type, enabled=False) if x.device.type in HAVE_AUTOCAST else nullcontext()


def require_one_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError that names the first tensor on another device than ``x``: a kernel would read its address."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but the input on {x.device}: move it there")


def require(holds: bool, op: str, message: str, *values: Any) -> None:
    """Raise a ValueError that names the operation unless ``holds``. The message is formatted only if it is needed."""
    if not holds:
        raise ValueError(f"{op}: {message.format(*values)}")
