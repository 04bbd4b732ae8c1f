"""``TRITON_INTERPRET=1 python -m fastdiff.benchmarks.traffic``: bytes that a training step moves beside its products.

Counted on the operations that a forward and backward pass in bf16 calls, on PyTorch's meta device: nothing is computed.
An operation reads each of its tensors once and writes its results once; a view moves nothing. The fused norm reads its
tensors a second time where its plan walks over the pixels twice. Convolutions, matrix products and attention, which
arithmetic bounds, are left out, but for three things: a convolution's bias, which cuDNN adds in a pass of its own, and
whose gradient is a sum over another one; the copy that a convolution makes of a gradient that is not dense; and a
product that is added to another, which is read and written once more.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.config import ModelConfig
from fastdiff.kernels.group_norm_silu.plan import plan
from fastdiff.models import build_model
from fastdiff.models.blocks import set_fuses
from fastdiff.presets import PRESETS

MULTIPROCESSORS = 132  # an H100's and an H200's
FREE = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
ARITHMETIC = ("mm", "bmm", "addmm", "attention", "attention_backward")


def traffic(model: ModelConfig, images: int, beside: bool = True) -> Mapping[str, int]:
    """Bytes by operation, of a forward and backward pass over ``images`` images.

    If ``beside``, the norms' kernels take over work beside them, as they do by default.
    """
    with torch.device("meta"):
        unet = build_model(model, kernels="triton", memory_format="channels_last").to(torch.bfloat16).train()
        set_fuses(unet, beside)
        x = torch.empty(images, 3, model.image_size, model.image_size, dtype=torch.bfloat16)
        t = torch.empty(images, dtype=torch.int64)

        def step() -> None:
            output = unet(x, t, t if model.class_cond else None)
            output.backward(torch.empty_like(output))

        return counted(step)


def counted(run: Callable[[], object]) -> Mapping[str, int]:
    """Bytes by operation, most first, of what ``run`` calls."""
    with _Counting() as counting:
        run()
    return dict(counting.bytes.most_common())


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _laid_out(func, args, func(*args, **(kwargs or {})))
        self.bytes.update(dict(_moved(func, args, result)))
        return result


def _moved(func: Any, args: Any, result: Any) -> Iterator[tuple[str, int]]:
    """What an operation moves, by name."""
    name = func.name().partition("::")[2].partition(".")[0]
    inputs, outputs = (_tensors(values) for values in (args, result))
    if name == "convolution":
        if args[2] is not None:
            yield "bias of a convolution", 2 * _size(outputs)
    elif name == "convolution_backward":
        if not _dense(args[0], args[2]):
            yield "copy of a gradient", 2 * _size(_tensors(args[0]))
        if args[-1][2]:
            yield "gradient of a bias", _size(_tensors(args[0]))
    elif name == "addmm_":
        yield "product added to another", 2 * _size(_tensors(args[0]))
    elif name in ARITHMETIC or func.is_view or name in FREE or not outputs:
        return
    elif name.startswith("group_norm_silu"):
        backward = name.endswith("backward")
        source = args[1:3] if backward else args[:2]
        again = () if _on_chip(_tensors(source), backward) else (*source, args[0]) if backward else source
        yield name, _size(inputs) + _size(outputs) + _size(_tensors(again))
    else:
        yield name, _size(inputs) + _size(outputs)


def _laid_out(func: Any, args: Any, result: Any) -> Any:
    """A convolution's results in its weight's layout, as cuDNN gives them; on the meta device they are contiguous."""
    weight = {"aten::convolution": 1, "aten::convolution_backward": 2}.get(func.name())
    if weight is None or not _channels_last(args[weight]):
        return result

    def last(x: Any) -> Any:
        return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x

    return tuple(map(last, result)) if isinstance(result, tuple) else last(result)


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor, weight: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last if _channels_last(weight) else torch.contiguous_format)


def _on_chip(source: list[Tensor], backward: bool) -> bool:
    x, last = source[0], _channels_last(source[0])
    n, channels, pixels = x.shape[0], sum(each.shape[1] for each in source), x.shape[2:].numel()
    return plan(n, channels, pixels, 32, last, x.element_size(), 1 + backward, MULTIPROCESSORS).on_chip


def _tensors(values: Any) -> list[Tensor]:
    """The different tensors among an operation's arguments or results, which may be in lists."""
    parts = values if isinstance(values, (tuple, list)) else (values,)
    flat = [each for part in parts for each in (part if isinstance(part, (tuple, list)) else (part,))]
    return list({id(value): value for value in flat if isinstance(value, Tensor)}.values())


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    """Print the table for ImageNet's 64-pixel model."""
    model = PRESETS["imagenet64_cond"].config(ModelConfig)
    apart, found = (traffic(model, 64, beside) for beside in (False, True))
    print("| operation | GB, each by itself | GB |\n|---|---:|---:|")
    for name in sorted(apart.keys() | found.keys(), key=lambda name: -max(apart.get(name, 0), found.get(name, 0))):
        sizes = apart.get(name, 0) / 1e9, found.get(name, 0) / 1e9
        if max(sizes) >= 0.005:
            print(f"| {name} | {sizes[0]:.2f} | {sizes[1]:.2f} |")
    before, after = sum(apart.values()) / 1e9, sum(found.values()) / 1e9
    print(f"| together | {before:.2f} | {after:.2f} |\n{1 - after / before:.1%} fewer")


if __name__ == "__main__":
    main()
