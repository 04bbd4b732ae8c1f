"""group_norm_silu in Triton, forward and backward.

With xhat = (x + input bias - mean) * rstd per sample and group, the layer is z = (xhat * weight + bias) * (1 + scale) +
shift = xhat * a + b per sample and channel, and y = silu(z). With dz = dy * silu'(z), all gradients come from two sums
per sample and channel, A = sum dz and B = sum dz * xhat:

    dshift = A,  dscale = weight * B + bias * A,  dbias = sum_n (1 + scale) * A,  dweight = sum_n (1 + scale) * B,
    dx = rstd * (dz * a - (sum_c a * A + xhat * sum_c a * B) / m),  with c over a group's channels and m its values.

The gradient of the input bias is the sum of dx over samples and pixels, taken as dx is written.

Where x is an output, too, because others use it, their gradient is added to dx as it is written. Where x is two
tensors, whose channels follow each other, pointers choose between them by channel; groups may have channels of both.

Tiles are (channels, pixels) in every layout; strides describe the memory order. A program handles complete groups of
one sample, and the channels of its tile are a power of two. Either all its pixels are one tile that stays in registers,
or it walks over them twice in chunks, the second time in reverse, because the last chunks are still in the cache. If
that would leave processors idle, the pixels are split among programs and each of the two walks is a separate launch.
Arithmetic is fp32, and the plan alone decides the order of sums: there are no atomics.

For fp32 x the first value of its group is subtracted before summation, and the mean is stored in two parts, an fp32
number and its rounding error: at x = 10000 +- 0.1 the number alone would be off by a hundredth of the deviation.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.group_norm_silu import backward, forward, plan
from fastdiff.kernels.group_norm_silu import parameters as parameter_gradients
from fastdiff.kernels.group_norm_silu.tile import Joined, Strided
from fastdiff.kernels.launch import launch, processors, register, temporary

FARTHEST = 2**31 - 1
"""Largest offset in a sample, in values, that 32 bits hold."""
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _dense_strides(x: Tensor, shape: Sequence[int]) -> list[int]:
    """Strides of a dense tensor in x's layout: channels_last if x's channels have the smallest strides."""
    last = shape[1] > 1 and any(size > 1 for size in shape[2:])
    last = last and all(x.stride(1) < x.stride(i) for i in range(2, x.ndim) if shape[i] > 1)
    strides, step = [0] * x.ndim, 1
    for i in [1, *range(x.ndim - 1, 1, -1), 0] if last else range(x.ndim - 1, -1, -1):
        strides[i] = step
        step *= max(shape[i], 1)
    return strides


def _empty_like(x: Tensor, second: Tensor | None = None) -> Tensor:
    """An uninitialised dense tensor in x's layout, with the channels of both."""
    shape = x.shape if second is None else (x.shape[0], x.shape[1] + second.shape[1], *x.shape[2:])
    return torch.empty_strided(shape, _dense_strides(x, shape), dtype=x.dtype, device=x.device)


def _steps(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of x as (N, C, pixels), or None if its pixels are not evenly spaced."""
    size = step = 0
    for i in range(x.ndim - 1, 1, -1):
        if x.shape[i] == 1:
            continue
        if size == 0:
            size, step = 1, x.stride(i)
        elif x.stride(i) != size * step:
            return None
        size *= x.shape[i]
    # a single pixel may have any stride; this one makes the channels adjacent
    return x.stride(0), x.stride(1), step if size else x.shape[1]


def _strided(x: Tensor, like: Tensor) -> Strided:
    """x, or a dense copy in the layout of outputs if its pixels are not evenly spaced or its values too far apart."""
    if math.prod(x.shape[1:]) - 1 > FARTHEST:
        raise ValueError(f"group_norm_silu: a sample of more than 2^31 values: {tuple(x.shape)}")
    steps = _steps(x)
    if steps is None or (x.shape[1] - 1) * steps[1] + (math.prod(x.shape[2:]) - 1) * steps[2] > FARTHEST:
        x = torch.empty_strided(x.shape, _dense_strides(like, x.shape), dtype=x.dtype, device=x.device).copy_(x)
        steps = _steps(x)
        assert steps is not None
    return Strided(x, *steps)


def _joined(x: Tensor, second: Tensor | None, like: Tensor) -> Joined:
    first = _strided(x, like)
    return Joined(first) if second is None else Joined(first, _strided(second, like), x.shape[1])


def _condition(values: Tensor | None) -> Strided | None:
    if values is None:
        return None
    n, c = values.stride()
    return Strided(values, n, c, 1)


def _division(x: Joined, shape: Sequence[int], groups: int, tensors: int) -> tuple[plan.Plan, dict[str, Any]]:
    """The plan for x of this shape, and the arguments that all kernels take from it."""
    (n, channels), pixels, first = shape[:2], math.prod(shape[2:]), x.first
    size, device = first.at.element_size(), first.at.device
    chosen = plan.plan(n, channels, pixels, groups, first.c < first.p, size, tensors, processors(device))
    shared = {
        "channels": channels,
        "pixels": pixels,
        "GROUPS": chosen.groups,
        "DEPTH": channels // groups,
        "BLOCK_CHANNELS": chosen.block_channels,
        "BLOCK_PIXELS": chosen.block_pixels,
        "EVEN": pixels % chosen.block_pixels == 0,
        "STAGES": chosen.stages if plan.pipelines(device) else 1,
        "KEPT": plan.KEPT,
        "num_warps": chosen.warps,
        "num_stages": 1,
        "maxnreg": chosen.registers,
    }
    return chosen, shared


def group_norm_silu(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_bias: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in x's layout; mean in two parts (2, N, G) and rstd (N, G), fp32."""
    y = _empty_like(x, second)
    n = x.shape[0]
    mean, rstd = _statistics(x, groups)
    if y.numel() == 0:
        return y, mean, rstd
    source = _joined(x, second, x)
    chosen, shared = _division(source, y.shape, groups, tensors=1)
    grid = n * chosen.blocks(groups), chosen.splits
    tensors: dict[str, Any] = {"x": source, "input_bias": _dense(input_bias)}
    outputs: dict[str, Any] = {"y": _joined(y, None, y), "high_out": mean[0], "low_out": mean[1], "rstd_out": rstd}
    layer: dict[str, Any] = {"weight": weight.contiguous(), "bias": bias.contiguous(), "eps": eps, "SILU": silu}
    layer |= {"scale": _condition(scale), "shift": _condition(shift)}
    if chosen.splits == 1:
        whole: dict[str, Any] = {"ON_CHIP": chosen.on_chip}
        launch(forward.group_norm_silu_forward, grid, x.device, **tensors, **outputs, **layer, **shared, **whole)
        return y, mean, rstd
    size = (n, chosen.splits, groups)
    names = ("partial_mean", "partial_rest", "partial_deviation")
    partial: dict[str, Any] = {name: temporary(size, x.device) for name in names}
    shared["pixels_per_split"] = chosen.pixels_per_split
    launch(forward.group_norm_silu_statistics, grid, x.device, **tensors, **partial, **shared)
    shared["BLOCK_SPLITS"] = plan.next_power(chosen.splits)
    launch(forward.group_norm_silu_apply, grid, x.device, **tensors, **partial, **outputs, **layer, **shared)
    return y, mean, rstd


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _fake_forward(
    x: Tensor,
    second: Tensor | None,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    input_bias: Any,
    groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x, second), *_statistics(x, groups)


def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], groups)
    high_and_low = torch.empty((2, *size), dtype=torch.float32, device=x.device)
    return high_and_low, torch.empty(size, dtype=torch.float32, device=x.device)


def _gradients(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_bias: Tensor | None,
    parameters: bool,
) -> Gradients:
    """Uninitialised dx, dsecond, dweight, dbias, dscale, dshift, dinput_bias; those that are not needed are empty."""
    size, none = (x.shape[0], weight.shape[0]), (0,)
    dsecond = torch.empty(none, dtype=x.dtype, device=x.device) if second is None else _empty_like(second)
    dweight, dbias, dinput_bias = (
        torch.empty(none, dtype=x.dtype, device=x.device)
        if t is None
        else torch.empty(t.shape if parameters else none, dtype=t.dtype, device=t.device)
        for t in (weight, bias, input_bias)
    )
    dscale, dshift = (
        torch.empty(none if t is None else size, dtype=x.dtype if t is None else t.dtype, device=x.device)
        for t in (scale, shift)
    )
    return _empty_like(x), dsecond, dweight, dbias, dscale, dshift, dinput_bias


def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    other: Tensor | None,
    other_second: Tensor | None,
    silu: bool,
    parameters: bool,
) -> Gradients:
    """dx plus ``other`` and dsecond plus ``other_second`` in the layouts of x and second, and the other gradients.

    These are dweight, dbias, dscale, dshift and dinput_bias. They are empty if absent or, without ``parameters``, not
    requested.
    """
    gradients = _gradients(x, second, weight, bias, scale, shift, input_bias, parameters)
    dx, dsecond, dweight, dbias, dscale, dshift, dinput_bias = gradients
    (n, channels), groups = dy.shape[:2], rstd.shape[1]
    if dy.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    source = _joined(x, second, x)
    chosen, shared = _division(source, dy.shape, groups, tensors=2)
    grid = n * chosen.blocks(groups), chosen.splits
    sum_dz, sum_dz_xhat = (temporary((n, channels), x.device) for _ in range(2))
    of_input = parameters and input_bias is not None
    sum_dx = temporary((n, chosen.splits, channels), x.device) if of_input else None
    gain = _condition(scale)
    tensors: dict[str, Any] = {
        "x": source,
        "input_bias": _dense(input_bias),
        "dy": _joined(dy, None, x),
        "mean_high": mean[0],
        "mean_low": mean[1],
        "rstd": rstd,
        "weight": weight.contiguous(),
        "bias": bias.contiguous(),
        "scale": gain,
        "shift": _condition(shift),
        "SILU": silu,
    }
    outputs: dict[str, Any] = {
        "other": Joined(None) if other is None else _joined(other, other_second, x),
        "dx": _joined(dx, None if second is None else dsecond, x),
        "sum_dz_out": sum_dz,
        "sum_dz_xhat_out": sum_dz_xhat,
        "sum_dx_out": sum_dx,
        "dscale": None if scale is None else dscale,
        "dshift": None if shift is None else dshift,
    }
    if chosen.splits == 1:
        whole: dict[str, Any] = {"ON_CHIP": chosen.on_chip}
        launch(backward.group_norm_silu_backward, grid, x.device, **tensors, **outputs, **shared, **whole)
    else:
        size = (n, chosen.splits, channels)
        partial_dz, partial_dz_xhat = (temporary(size, x.device) for _ in range(2))
        shared["pixels_per_split"] = chosen.pixels_per_split
        partial: dict[str, Any] = {"partial_dz": partial_dz, "partial_dz_xhat": partial_dz_xhat}
        launch(backward.group_norm_silu_backward_sums, grid, x.device, **tensors, **partial, **shared)
        shared["BLOCK_SPLITS"] = plan.next_power(chosen.splits)
        launch(backward.group_norm_silu_backward_apply, grid, x.device, **tensors, **partial, **outputs, **shared)
    if parameters:
        launch(
            parameter_gradients.group_norm_silu_backward_parameters,
            (triton.cdiv(channels, 32),),
            x.device,
            sum_dz=sum_dz,
            sum_dz_xhat=sum_dz_xhat,
            sum_dx=sum_dx,
            scale=gain,
            dweight=dweight,
            dbias=dbias,
            dinput_bias=dinput_bias if of_input else None,
            samples=n,
            splits=chosen.splits,
            channels=channels,
            BLOCK_SAMPLES=min(plan.next_power(n), 64),
            BLOCK_CHANNELS=32,
            num_warps=4,
            num_stages=1,
        )
    return gradients


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    input_bias: Tensor | None,
    *rest: Any,
) -> Gradients:
    return _gradients(x, second, weight, bias, scale, shift, input_bias, parameters=rest[-1])


_forward = register(group_norm_silu, _fake_forward, repeats=True)
_backward = register(group_norm_silu_backward, _fake_backward, repeats=True)


class GroupNormSiLU(torch.autograd.Function):
    """The two operators as a function and its gradient; the activation is recomputed, not saved."""

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
        input_bias: Tensor | None,
        with_input: bool,
        second: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        """See op.py."""
        y, mean, rstd = _forward(x, second, weight, bias, scale, shift, input_bias, groups, eps, silu)
        ctx.save_for_backward(x, second, weight, bias, scale, shift, input_bias, mean, rstd)
        ctx.silu = silu
        ctx.set_materialize_grads(False)  # no gradient of an output that has no use
        if not with_input:
            return y
        return (y, x) if second is None else (y, x, second)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, other: Tensor | None = None, other_second: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients at the positions of their inputs; those of the other uses of x and second are added to theirs."""
        x, second, weight, bias, scale, shift, input_bias, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = _empty_like(x, second).zero_()
        if second is not None and (other is None) != (other_second is None):
            other = torch.zeros_like(x) if other is None else other
            other_second = torch.zeros_like(second) if other_second is None else other_second
        parameters = any(ctx.needs_input_grad[i] for i in (1, 2, 8))
        dx, dsecond, dweight, dbias, dscale, dshift, dinput_bias = _backward(
            dy, x, second, weight, bias, scale, shift, input_bias, mean, rstd, other, other_second, ctx.silu, parameters
        )
        if not parameters:
            dweight = dbias = None
        return (
            dx,
            dweight,
            dbias,
            None,
            None,
            dscale if scale is not None else None,
            dshift if shift is not None else None,
            None,
            dinput_bias if parameters and input_bias is not None else None,
            None,
            dsecond if second is not None else None,
        )
