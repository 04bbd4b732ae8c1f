"""The work of a model's passes on paper: operations of convolutions and of matrix products, and numbers to move."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastdiff.benchmarks.workload import Workload, inputs
from fastdiff.config import DiffusionConfig, Kernels, ModelConfig
from fastdiff.models import build_model

aten = torch.ops.aten

BYTES_OF_UPDATE = 4 * (4 + 3) + 4 * (2 + 1)
"""Per parameter, all in fp32: AdamW reads it, its gradient and two moments and writes all but the gradient; an EMA is
read and written, and the parameter is read once more."""


@dataclass(frozen=True)
class Convolution:
    """A square 3x3 convolution of stride 1."""

    batch_size: int
    channels_in: int
    channels_out: int
    size: int

    @property
    def flops(self) -> int:
        """Operations of the forward pass, two for each multiply-add."""
        return 2 * 9 * self.batch_size * self.size**2 * self.channels_in * self.channels_out


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, two for each multiply-add, and numbers moved.

    Every convolution and matrix product reads its inputs and writes its outputs once, in the precision of its
    computation. Everything else could be fused into them and is not counted. ``fp32_bytes`` are moved in addition, in
    fp32 whatever the precision, by an update of the weights or a sampling step.
    """

    conv_flops: float
    matmul_flops: float
    numbers: float
    fp32_bytes: float = 0
    convolutions: Mapping[Convolution, int] = field(default_factory=dict)
    """The 3x3 convolutions of the forward pass, with their counts."""

    @classmethod
    @cache
    def of(cls, config: ModelConfig, batch_size: int, training: bool) -> Self:
        """One forward pass of our model or, if ``training``, an update: with its backward pass, AdamW and one EMA.

        The recomputation of use_checkpoint is not counted.
        """
        with torch.device("meta"):
            # the reference, whose attention consists of plain matrix products, which are counted
            model = build_model(dataclasses.replace(config, use_checkpoint=False), Kernels.REFERENCE)
        return cls.of_module(model, model, config, batch_size, training)

    @classmethod
    def of_module(
        cls, module: nn.Module, call: Callable[..., Tensor], config: ModelConfig, batch_size: int, training: bool
    ) -> Self:
        """The work of any module on the meta device that is called like our model of ``config``."""
        x, t, conditions = inputs(Workload(config, DiffusionConfig(), batch_size, torch.device("meta")))
        counted = _Count()
        with torch.set_grad_enabled(training), counted:
            output = call(x, t.float(), **conditions)
            if training:
                output.sum().backward()
        fp32_bytes = BYTES_OF_UPDATE * sum(p.numel() for p in module.parameters()) if training else 0
        return cls(counted.conv_flops, counted.matmul_flops, counted.numbers, fp32_bytes, counted.convolutions)

    @property
    def flops(self) -> float:
        """Operations of convolutions and matrix products together."""
        return self.conv_flops + self.matmul_flops

    def n_bytes(self, dtype: torch.dtype) -> float:
        """The bytes moved by a computation in ``dtype``."""
        return self.numbers * dtype.itemsize + self.fp32_bytes

    def times(self, count: int) -> Self:
        """The work of ``count`` repetitions."""
        conv_flops, matmul_flops = self.conv_flops * count, self.matmul_flops * count
        return type(self)(conv_flops, matmul_flops, self.numbers * count, self.fp32_bytes * count, self.convolutions)


class _Count(TorchDispatchMode):
    """Sums over the operations that PyTorch's FlopCounterMode counts, by its formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_flops = self.matmul_flops = self.numbers = 0
        self.convolutions: Counter[Convolution] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        count: Callable[..., int] | None = flop_registry.get(operation)
        if count is None:
            return out
        flops = count(*args, **kwargs, out_val=out)
        outputs = out if isinstance(out, tuple) else (out,)
        self.numbers += sum(t.numel() for t in (*args, *outputs) if isinstance(t, Tensor))
        if operation in (aten.convolution, aten.convolution_backward):
            self.conv_flops += flops
        else:
            self.matmul_flops += flops
        if operation is aten.convolution:
            x, weight, _, stride = args[:4]
            if stride == [1, 1] and weight.shape[2:] == (3, 3):
                self.convolutions[Convolution(x.shape[0], x.shape[1], weight.shape[0], x.shape[2])] += 1
        return out
