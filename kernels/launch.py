"""Registration of the kernels with PyTorch, and their launch.

Within kernels/ only files named kernel.py import this module, because it needs Triton.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: its arguments by name, compile-time constants included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


_recorded: list[Launch] | None = None
MOST_CALLS = 4096
"""Different calls of one operator whose launches are kept."""


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
    kernel: Any,
    grid: tuple[int, ...],
    device: torch.device,
    /,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
    **arguments: Any,
) -> None:
    """Run ``kernel`` with all arguments passed by name; ValueError if the grid is too large for a GPU.

    ``maxnreg`` is the most registers of a thread, on NVIDIA's GPUs; None leaves them to the compiler.
    """
    for size, limit in zip(grid, GRID_LIMITS, strict=False):
        if size > limit:
            raise ValueError(f"{kernel.fn.__name__}: a grid of {grid} programs exceeds the GPU's limit {GRID_LIMITS}")
    this = Launch(kernel, grid, arguments, num_warps, num_stages, maxnreg)
    if _recorded is not None:
        _recorded.append(this)
    elif all(grid):
        registers: dict[str, Any] = {} if maxnreg is None or torch.version.hip is not None else {"maxnreg": maxnreg}
        with _on(device):
            try:
                compiled = kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, **registers)
            except RuntimeError as error:
                if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                    raise
                raise RuntimeError(
                    f"{kernel.fn.__name__} cannot run first during the capture of a CUDA graph ({error}): call it once "
                    "before, with tensors of the same shapes, strides and alignment"
                ) from error
        if _call.launches is not None:
            _call.launches.append((compiled, this))


def _on(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class _Call(threading.local):
    """The launches and temporaries of the operator that this thread prepares; autograd has threads of its own."""

    launches: list[tuple[Any, Launch]] | None = None
    temporaries: list[Tensor]


_call = _Call()


def temporary(size: Sequence[int], device: torch.device) -> Tensor:
    """An uninitialised fp32 tensor that an operator's kernels write and read, and nothing else does."""
    tensor = torch.empty(size, dtype=torch.float32, device=device)
    if _call.launches is not None:
        _call.temporaries.append(tensor)
    return tensor


@dataclass(frozen=True)
class _Prepared:
    """The launches of an operator for equal calls, and what they need: only the addresses differ."""

    allocated: Sequence[tuple[Any, Any, torch.dtype]]  # size, stride and dtype of the outputs and temporaries
    outputs: int
    launches: Sequence[tuple[Any, Callable[[Sequence[int]], tuple[Any, ...]]]]
    """What runs a kernel, and its arguments for the addresses of the inputs, outputs and temporaries."""

    def __call__(self, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Launch, and return the outputs."""
        fresh = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.allocated
        ]
        addresses = [tensor.data_ptr() for tensor in (*inputs, *fresh)]
        with _on(device):
            for run, arguments_at in self.launches:
                run(*arguments_at(addresses))
        return fresh[: self.outputs]


def _prepared(
    launches: Sequence[tuple[Any, Launch]], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> _Prepared | None:
    """None if a launch was interpreted, or has an address of no known tensor (an input's copy) or of two of them."""
    fresh = [*outputs, *_call.temporaries]
    spans = [_span(tensor) for tensor in (*inputs, *fresh)]
    prepared = []
    for compiled, launch in launches:
        if compiled is None:
            return None
        arguments = tuple(launch.arguments.get(each.name, each.default) for each in launch.kernel.params)
        constants: list[Any] = []
        if (text := _written(arguments, spans, constants)) is None:
            return None
        # compiled, because a loop over the arguments costs every launch about ten microseconds
        arguments_at = eval(f"lambda a: {text}", {"constants": constants})
        prepared.append((compiled[(*launch.grid, 1, 1)[:3]], arguments_at))
    return _Prepared([(t.size(), t.stride(), t.dtype) for t in fresh], len(outputs), prepared)


def _written(value: Any, spans: Sequence[tuple[int, int]], constants: list[Any]) -> str | None:
    """A kernel's argument as an expression of the tensors' addresses ``a``; None if a tensor has no place there.

    Tuples may be within tuples. What is not written is put into ``constants``.
    """
    if isinstance(value, tuple):
        parts = [_written(part, spans, constants) for part in value]
        return None if None in parts else "(" + "".join(f"{part}, " for part in parts) + ")"
    if isinstance(value, Tensor):
        if not (address := value.data_ptr()):
            return "0"
        found = [i for i, (start, _) in enumerate(spans) if start == address]
        found = found or [i for i, (start, end) in enumerate(spans) if start <= address < end]
        if len(found) != 1:
            return None
        return f"a[{found[0]}] + {address - spans[found[0]][0]}"
    constants.append(value)
    return f"constants[{len(constants) - 1}]"


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to the end of its last one; an expanded tensor repeats elements."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _repeating(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an operator on GPUs, which works out its launches once for equal calls.

    Calls are equal if their tensors have the same shapes, strides, dtypes and alignment, and their other arguments are
    the same: nothing else may decide the launches, see ``forget``. Without this a norm and its gradient take the host
    250 us, for dictionaries, plans and Triton's binder.
    """
    known: dict[tuple[object, ...], _Prepared | None] = {}
    _known.append(known)

    def run(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if _recorded is not None or not _repeats(tensors[0]):
            return implementation(*arguments)
        device = tensors[0].device
        key = tuple([
            (v.dtype, v.device, v.shape, v.stride(), v.data_ptr() % 16) if isinstance(v, Tensor) else v
            for v in arguments
        ])  # fmt: skip
        if (prepared := known.get(key)) is not None:
            outputs = prepared(tensors, device)
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        if key in known:
            return implementation(*arguments)
        _call.launches, _call.temporaries = [], []
        try:
            found = implementation(*arguments)
            if len(known) >= MOST_CALLS:
                known.clear()
            known[key] = _prepared(_call.launches, tensors, found if isinstance(found, tuple) else (found,))
        finally:
            _call.launches, _call.temporaries = None, []
        return found

    return run


_known: list[dict[tuple[object, ...], _Prepared | None]] = []


def forget() -> None:
    """Prepare every call anew, after something changed that is no argument of a call, such as a plan's constants."""
    for known in _known:
        known.clear()


def _repeats(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0


def register(implementation: Callable[..., Any], fake: Callable[..., Any], repeats: bool = False) -> Any:
    """Register ``implementation`` as the PyTorch operator fastdiff::<its name>, which is opaque to torch.compile.

    ``fake`` creates outputs of the same shapes, dtypes and strides for tracing. A torch.autograd.Function around the
    operator, next to its registration, defines the gradient. This takes 8 us per call with gradients;
    torch.library.custom_op with register_autograd took 20 us.

    With ``repeats`` equal calls on a GPU share the preparation of their launches. The operator then computes nothing
    outside its kernels, and takes its temporaries from ``temporary``.
    """
    name = f"fastdiff::{implementation.__name__}"
    schema = torch.library.infer_schema(implementation, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(name, ("CPU", "CUDA"), _repeating(implementation) if repeats else implementation)
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
