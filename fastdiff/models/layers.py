"""The small layers of the UNet. Parameter names and shapes match improved-diffusion's."""

import math
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import kernels
from fastdiff.config import GROUPS
from fastdiff.kernels.backend import without_autocast

M = TypeVar("M", bound=nn.Module)
Resize = Callable[[Tensor], Tensor] | None
"""Halves or doubles a feature map, (N, C, H, W) -> (N, C, H', W'); None keeps its size."""


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding, cosines first (Vaswani et al. 2017, section 3.5). (N,), may be fractional -> (N, dim)"""

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = 10_000) -> None:
        super().__init__()
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32)
        # A buffer, so that no forward pass computes or copies it; not persistent, to keep the original's state dict.
        self.register_buffer("frequencies", torch.exp(-math.log(max_period) * steps / half), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) moves the frequencies, but must not round them
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, timesteps: Tensor) -> Tensor:
        """Always in fp32, whatever the model's precision: bf16 cannot hold the fraction of a timestep near 999."""
        angles = timesteps[:, None].float() * self.frequencies  # (N, dim / 2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zeroed(module: M) -> M:
    """Zero all parameters of the module and return it, so that a residual branch initially contributes nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size, or halves it with stride 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W'), without the bias if the operation after it adds that."""
        return F.conv2d(x, self.weight, self.bias if add_bias else None, self.stride, self.padding)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution of a feature map, or of two whose channels follow each other, without concatenating them."""

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, second: Tensor | None = None, other_bias: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W), second: (N, C2, H, W) or None -> (N, C', H, W). ``other_bias`` (C',) is added, too."""
        if second is None and other_bias is None:
            return super().forward(x)
        bias = self.bias if other_bias is None else self.bias + other_bias
        maps = [x] if second is None else [x, second]
        sizes = [each.shape[1] for each in maps]
        if not x.is_contiguous(memory_format=torch.channels_last):
            weights = self.weight.split(sizes, dim=1)
            y = F.conv2d(x, weights[0], bias)
            return y if second is None else y + F.conv2d(second, weights[1])
        # Products of pixels: cuBLAS adds the bias and the product before as it writes, for which cuDNN needs passes.
        # The weight's dimensions are permuted so that its gradient has its strides, as DDP's buckets want.
        weights = self.weight.permute(0, 2, 3, 1).flatten(1).split(sizes, dim=1)
        rows = [each.permute(0, 2, 3, 1).flatten(0, 2) for each in maps]
        y = F.linear(rows[0], weights[0], bias)
        if second is not None:
            if torch.compiler.is_compiling():  # fuses this sum with the next one
                y = y + F.linear(rows[1], weights[1])
            else:
                y.addmm_(rows[1].to(y.dtype), weights[1].to(y.dtype).t())
        return y.unflatten(0, (x.shape[0], *x.shape[2:])).permute(0, 3, 1, 2)


class GroupNormSiLU(nn.Module):
    """GroupNorm, optional scale and shift, optional SiLU, as one operation of fastdiff.kernels. (N, C, *spatial)"""

    def __init__(self, channels: int, backend: str, silu: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.silu = silu
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        input_bias: Tensor | None = None,
        second: Tensor | None = None,
        with_input: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """x: (N, C) or (N, C, *spatial); scale, shift: (N, C) or None; input_bias: (C,) or None.

        The channels of ``second``, if any, follow x's. With ``with_input`` x and second are returned, too, for their
        other uses, whose gradients the norm's kernel then adds.
        """
        if x.ndim == 2:  # the operation wants a spatial dimension
            found = self(
                x[:, :, None], scale, shift, input_bias, None if second is None else second[:, :, None], with_input
            )
            return tuple(each[:, :, 0] for each in found) if with_input else found[:, :, 0]
        options: dict[str, Any] = {"groups": GROUPS, "silu": self.silu, "backend": self.backend}
        options |= {"scale": scale, "shift": shift, "input_bias": input_bias}
        options |= {"second": second, "with_input": with_input}
        return kernels.group_norm_silu(x, self.weight, self.bias, **options)


class TokenLinear(nn.Conv1d):
    """A 1x1 Conv1d's parameters applied to (N, T, C) as a matrix product, without a transpose."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, C) -> (N, T, C')."""
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class QKVLinear(TokenLinear):
    """q, k and v of tokens: (N, T, C) -> (N, T, 3C), heads outermost and q, k, v within each, as the attention reads.

    The rows of its parameters are in that order, or with ``new_order`` q, k, v outermost and heads within each
    (guided-diffusion's use_new_attention_order).
    """

    bias: nn.Parameter

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__(channels, 3 * channels)
        self.heads = heads
        self.new_order = new_order

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, T, C) -> (N, T, 3C)."""
        if not self.new_order:
            return super().forward(x)
        # the parameters and not the output: they are smaller, and their cast under autocast copies them anyway
        weight, bias = map(self._heads_outermost, (self.weight, self.bias))
        return F.linear(x, weight.squeeze(-1), bias)

    def reorder(self) -> None:
        """Put the rows of the parameters heads outermost, in place, so that no call has to."""
        if self.new_order:
            for parameter in (self.weight, self.bias):
                parameter.data = self._heads_outermost(parameter.data)
            self.new_order = False

    def _heads_outermost(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W)."""
        return self.conv(repeat_pixels(x))


def average_pixels(x: Tensor) -> Tensor:
    """Average over squares of 2x2 pixels. (N, C, H, W) -> (N, C, H/2, W/2)"""
    return F.avg_pool2d(x, 2)


def repeat_pixels(x: Tensor) -> Tensor:
    """Repeat every pixel twice in both directions. (N, C, H, W) -> (N, C, 2H, 2W)"""
    if not torch.compiler.is_compiling():
        with without_autocast(x):  # which would return fp32 on a GPU
            return F.interpolate(x, scale_factor=2, mode="nearest")
    # Do not use interpolate: under autocast to bf16 on a CPU, Inductor (PyTorch 2.13) silently gives it a zero gradient
    # in this model. tests/runtime/test_device.py compares the compiled model's gradients with the eager one's.
    n, c, h, w = x.shape
    tokens = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(n, h, 2, w, 2, c)
    return tokens.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Downsampling by 2 with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H/2, W/2)."""
        return self.op(x)
