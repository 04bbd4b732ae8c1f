"""group_norm_silu for torch.compile on a CPU, with sums per channel, which follow the memory order of channels_last.

Inductor's GroupNorm sums over a group's few channels, a fraction of a vector, and saves fp32 intermediates for the
backward pass. This version makes two passes over x forward and two over x and dy backward, and writes nothing of x's
size but the result.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.graph_cache import let_cache


@torch.compiler.allow_in_graph
def group_norm_silu(*arguments: Any) -> Tensor:
    """See op.py. Dynamo sees a single operation: tracing both passes of all norms of a model takes it ten seconds."""
    return GroupNormSiLU.apply(*arguments)


# the version covers only this file, so that the traced code must not call fastdiff's other modules
let_cache(f"{__name__}.{group_norm_silu.__name__}", version=hashlib.sha256(Path(__file__).read_bytes()).hexdigest())


class GroupNormSiLU(torch.autograd.Function):
    """Saves x and the statistics; the backward pass recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
    ) -> Tensor:
        wide, space = _shifted(x, groups), _space(x)
        own = wide.mean(space)  # (N, C)
        spread = (wide - _everywhere(own, x)).square().mean(space)
        mean = _mean_of_group(own, groups)
        variance = _mean_of_group(spread + (own - mean).square(), groups)
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        factor, addend = _affine(mean, weight, bias, scale, shift)
        y = (wide - _everywhere(mean, x)) * _everywhere(rstd * factor, x) + _everywhere(addend, x)
        return (y * _sigmoid(y) if silu else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias, scale and shift."""
        x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
        factor, addend = _affine(mean, weight, bias, scale, shift)
        centred, g = _shifted(x, ctx.groups) - _everywhere(mean, x), _wide(dy)
        if ctx.silu:
            y = centred * _everywhere(rstd * factor, x) + _everywhere(addend, x)
            s = _sigmoid(y)
            g = g * s * (1 + y * (1 - s))
        total = g.sum(_space(x))  # (N, C), the gradient of the addend
        along = rstd * (g * centred).sum(_space(x))  # (N, C), the gradient of the factor
        pixels = math.prod(x.shape[2:])
        mean_g = rstd * _mean_of_group(factor * total, ctx.groups) / pixels
        mean_gx = rstd.square() * _mean_of_group(factor * along, ctx.groups) / pixels
        dx = g * _everywhere(rstd * factor, x) - centred * _everywhere(mean_gx, x) - _everywhere(mean_g, x)
        scaled = 1 if scale is None else 1 + _wide(scale)
        return (
            dx.to(x.dtype),
            (along * scaled).sum(0).to(weight.dtype),
            (total * scaled).sum(0).to(bias.dtype),
            None,
            None,
            None if scale is None else (along * _wide(weight) + total * _wide(bias)).to(scale.dtype),
            None if shift is None else total.to(shift.dtype),
            None,
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _shifted(x: Tensor, groups: int) -> Tensor:
    """x minus one value of each group, which a norm cancels: rounding the mean then costs nothing.

    Half-precision x does not need it: the mean's fp32 rounding error is far below x's own.
    """
    if x.dtype.itemsize == 2:
        return _wide(x)
    n, c = x.shape[:2]
    first = x.flatten(2)[:, :: c // groups, :1]  # (N, G, 1)
    return _wide(x) - _everywhere(_wide(first.expand(n, groups, c // groups).reshape(n, c)), x)


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _mean_of_group(values: Tensor, groups: int) -> Tensor:
    """(N, C) -> (N, C): every channel gets its group's mean."""
    n, c = values.shape
    grouped = values.view(n, groups, c // groups)
    return grouped.mean(2, keepdim=True).expand_as(grouped).reshape(n, c)


def _affine(
    like: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The factor and the addend of the normalised x, (N, C) each."""
    factor, addend = _wide(weight).expand_as(like), _wide(bias).expand_as(like)
    if scale is not None:
        factor, addend = factor * (1 + _wide(scale)), addend * (1 + _wide(scale))
    return factor, addend if shift is None else addend + _wide(shift)


def _everywhere(values: Tensor, x: Tensor) -> Tensor:
    """(N, C) -> x's shape, with equal values at every pixel.

    With strides Inductor writes the values to memory; it would recompute an expanded tensor at every pixel.
    """
    return values.contiguous().as_strided(x.shape, (x.shape[1], 1, *[0] * (x.ndim - 2)))


def _sigmoid(y: Tensor) -> Tensor:
    # exp2, not exp: Inductor would write the result of an exp that is used twice to memory
    return 1 / (1 + torch.exp2(y * -math.log2(math.e)))
