"""``python -m tests.kernels.repeated_calls``: what the first and a further call of each operator launch, as JSON.

With ``--time`` the microseconds that a call takes the host, prepared anew and repeated.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels import launch
from fastdiff.kernels.attention.kernel import _backward as attention_backward
from fastdiff.kernels.attention.kernel import _forward as attention
from fastdiff.kernels.group_norm_silu import kernel
from fastdiff.kernels.group_norm_silu.kernel import _backward as norm_backward
from fastdiff.kernels.group_norm_silu.kernel import _forward as norm

from . import driver

LAST = torch.channels_last
BF16 = torch.bfloat16


def image(n: int, channels: int, size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(n, channels, size, size, dtype=dtype).contiguous(memory_format=LAST)


def vector(channels: int) -> Tensor:
    return torch.empty(channels)


def cases() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """An operator and its arguments: one launch, several with temporaries, and an input that must be copied."""
    scale, shift = torch.empty(2, 256, dtype=BF16).chunk(2, dim=1)
    statistics = torch.empty(2, 2, 32), torch.empty(2, 32)
    y, qkv = torch.empty(2, 64, 128, dtype=BF16), torch.empty(2, 64, 384, dtype=BF16)
    long_y, long_qkv = torch.empty(1, 1024, 64, dtype=BF16), torch.empty(1, 1024, 192, dtype=BF16)
    streamed = [torch.empty_like(long_y), long_qkv, long_y, torch.empty(1, 1, 1024), 1]
    return {
        "norm": (norm, [image(2, 128, 8), vector(128), vector(128), scale, shift, 32, 1e-5, True]),
        "split norm": (norm, [image(1, 128, 128, torch.float32), vector(128), vector(128), None, None, 32, 1e-5, True]),
        "strided weight": (norm, [image(2, 128, 8), vector(256)[::2], vector(128), None, None, 32, 1e-5, True]),
        "norm's gradient": (
            norm_backward,
            [image(2, 128, 8), image(2, 128, 8), vector(128), vector(128), scale, shift, *statistics, True, True],
        ),
        "attention": (attention, [qkv, 4]),
        "attention's gradient": (attention_backward, [y, qkv, None, None, 4]),
        "long attention's gradient": (attention_backward, streamed),
    }


def moved(value: Any) -> Any:
    """The same elsewhere."""
    if not isinstance(value, Tensor):
        return value
    place = torch.empty(value.untyped_storage().nbytes() // value.element_size() + 64, dtype=value.dtype)
    return place.as_strided(value.shape, value.stride(), value.storage_offset())


def called(op: Callable[..., Any], arguments: list[Any]) -> tuple[list[Any], list[Any]]:
    """The launches of a call, with its addresses named by the tensors there, and what its outputs are like."""
    driver.launched.clear()
    found = op(*arguments)
    outputs = found if isinstance(found, tuple) else (found,)
    ranges = {
        f"{kind} {i}": (tensor.data_ptr(), tensor)
        for kind, tensors in (("input", arguments), ("output", outputs))
        for i, tensor in enumerate(tensors)
        if isinstance(tensor, Tensor) and tensor.numel()
    }

    def named(value: Any) -> Any:
        if not isinstance(value, int) or value < 2**32:
            return value
        exact = [name for name, (start, _) in ranges.items() if start == value]
        inside = [
            f"{n} + {value - s}" for n, (s, t) in ranges.items() if t.is_contiguous() and s < value < s + t.nbytes
        ]
        return (exact or inside or ["a temporary"])[0]

    launched = [(name, grid, [named(value) for value in arguments]) for name, grid, arguments in driver.launched]
    return launched, [(tuple(t.shape), t.stride(), str(t.dtype)) for t in outputs]


def compared(op: Callable[..., Any], arguments: list[Any]) -> dict[str, object]:
    prepared: list[object] = []
    run = launch._Prepared.__call__

    def counted(self: Any, *rest: Any) -> Any:
        prepared.append(self)
        return run(self, *rest)

    launch._repeats = lambda _: False
    expected = called(op, arguments)
    launch._repeats = lambda _: True
    launch._Prepared.__call__ = counted  # type: ignore[method-assign]
    same = [called(op, [moved(value) for value in arguments]) == expected for _ in range(3)]
    launch._Prepared.__call__ = run  # type: ignore[method-assign]
    return {"launches": len(expected[0]), "same": same, "prepared": len(prepared)}


def microseconds(op: Callable[..., Any], arguments: list[Any]) -> float:
    for _ in range(200):
        op(*arguments)
    began = time.perf_counter()
    for _ in range(2000):
        op(*arguments)
    return (time.perf_counter() - began) / 2000 * 1e6


def main() -> None:
    driver.install()
    kernel.processors = lambda _: 132
    found: dict[str, object] = {}
    for name, (op, arguments) in cases().items():
        if "--time" in sys.argv:
            launch._repeats = lambda _: False
            before = microseconds(op, arguments)
            launch._repeats = lambda _: True
            found[name] = before, microseconds(op, arguments)
        else:
            found[name] = compared(op, arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
