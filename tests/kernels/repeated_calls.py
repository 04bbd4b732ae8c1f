"""``python -m tests.kernels.repeated_calls``: what the first and a further call of each operator launch, as JSON.

With ``--time`` the microseconds that a call takes the host, prepared anew and repeated.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

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
    layer = [None, vector(128), vector(128), None, None, None]
    expanded, repeated = torch.empty(1).expand(2, 128, 8, 8), torch.empty(2, 128, 8, 1).expand(2, 128, 8, 8)
    fp32, pair = image(2, 128, 8, torch.float32), (image(2, 128, 8), image(2, 128, 8))
    many, limited = (image(64, 512, 8), image(64, 512, 8)), (torch.empty(2, 64, 32), torch.empty(64, 32))
    both, others = ([image(2, 80, 8), image(2, 48, 8)] for _ in range(2))
    return {
        "norm": (norm, [image(2, 128, 8), None, vector(128), vector(128), scale, shift, None, 32, 1e-5, True]),
        "split norm": (norm, [image(1, 128, 128, torch.float32), *layer, 32, 1e-5, True]),
        "strided weight": (norm, [image(2, 128, 8), None, vector(256)[::2], *layer[2:], 32, 1e-5, True]),
        "input bias": (norm, [image(2, 128, 8), *layer[:-1], vector(128), 32, 1e-5, True]),
        "norm's gradient": (
            norm_backward,
            [*pair, *layer[:3], scale, shift, vector(128), *statistics, image(2, 128, 8), None, True, True],
        ),
        "two inputs": (norm, [image(2, 80, 8), image(2, 48, 8), *layer[1:], 32, 1e-5, True]),
        "gradients of two inputs": (norm_backward, [pair[0], *both, *layer[1:], *statistics, *others, True, True]),
        "limited registers": (
            norm_backward,
            [*many, None, vector(512), vector(512), None, None, None, *limited, None, None, True, True],
        ),
        "expanded gradient": (norm_backward, [expanded, fp32, *layer, *statistics, None, None, True, True]),
        "copied gradient": (norm_backward, [repeated, fp32, *layer, *statistics, None, None, True, True]),
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
    allocated: list[Tensor] = []

    def kept(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            allocated.append(allocate(*args, **kwargs))
            return allocated[-1]

        return wrapped

    with patch.multiple(torch, empty=kept(torch.empty), empty_strided=kept(torch.empty_strided)):
        found = op(*arguments)
    outputs = found if isinstance(found, tuple) else (found,)
    returned = {output.data_ptr() for output in outputs}
    temporaries = [tensor for tensor in allocated if tensor.data_ptr() not in returned]
    names: dict[int, str] = {}
    for kind, tensors in (("temporary", temporaries), ("output", outputs), ("input", arguments)):
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.numel():
                names[tensor.data_ptr()] = f"{kind} {i}"
                if tensor.ndim == 3 and tensor.shape[0] == 2:  # the second part of a mean
                    names.setdefault(tensor[1].data_ptr(), f"{kind} {i}, second half")

    def named(values: list[Any]) -> list[Any]:
        return [
            named(v) if isinstance(v, list) else names.get(v, "unknown") if isinstance(v, int) and v > 2**32 else v
            for v in values
        ]

    launched = [(name, grid, named(values)) for name, grid, values in driver.launched]
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
    unknown = any("unknown" in str(values) for _, _, values in expected[0])
    return {"launches": len(expected[0]), "same": same, "prepared": len(prepared), "unknown": unknown}


def microseconds(op: Callable[..., Any], arguments: list[Any]) -> float:
    for _ in range(200):
        op(*arguments)
    began = time.perf_counter()
    for _ in range(2000):
        op(*arguments)
    return (time.perf_counter() - began) / 2000 * 1e6


def main() -> None:
    driver.install(keep="--time" not in sys.argv)
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
