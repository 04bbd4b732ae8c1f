"""The public operation: checks the arguments and chooses the implementation."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fastdiff.kernels.backend import HAS_TRITON, Backend, choose, require, require_one_device, without_autocast
from fastdiff.kernels.group_norm_silu import pytorch, reference

IMPLEMENTATIONS = {Backend.TORCH: pytorch.group_norm_silu, Backend.REFERENCE: reference.group_norm_silu}
if HAS_TRITON:
    from fastdiff.kernels.group_norm_silu import kernel

    IMPLEMENTATIONS[Backend.TRITON] = kernel.GroupNormSiLU.apply


@overload
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = ...,
    eps: float = ...,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    silu: bool = ...,
    input_bias: Tensor | None = ...,
    second: Tensor | None = ...,
    with_input: Literal[False] = ...,
    backend: Backend | str = ...,
) -> Tensor: ...


@overload
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = ...,
    eps: float = ...,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    silu: bool = ...,
    input_bias: Tensor | None = ...,
    second: None = ...,
    with_input: Literal[True],
    backend: Backend | str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = ...,
    eps: float = ...,
    scale: Tensor | None = ...,
    shift: Tensor | None = ...,
    silu: bool = ...,
    input_bias: Tensor | None = ...,
    second: Tensor,
    with_input: Literal[True],
    backend: Backend | str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    input_bias: Tensor | None = None,
    second: Tensor | None = None,
    with_input: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Tensor | tuple[Tensor, ...]:
    """y = act(((x + input_bias - mean) * rstd * weight + bias) * (1 + scale) + shift), act SiLU or the identity.

    Group normalisation (Wu & He 2018) with the conditioning of Nichol & Dhariwal 2021, section 2. Mean and rstd are
    per sample and group, in fp32.

    x: (N, C, *spatial) of any floating-point dtype, contiguous or channels_last; weight, bias: (C,); scale, shift:
    (N, C) or None; input_bias: (C,) or None, such as that of the convolution before, which then needs no pass of its
    own. second: None, or (N, C2, *spatial) of x's dtype, whose channels follow x's as if the two were concatenated,
    such as a skip connection's; every C above then counts both. Returns y (N, C, *spatial) with x's dtype and memory
    format, or with ``with_input`` (y, x) or (y, x, second): the backward kernel adds the gradients of these outputs to
    those of x and second, for which autograd would need passes of its own. ValueError if shapes, dtypes or devices do
    not match, or the backend cannot run.

    The Triton kernels add in an order that depends on the number of multiprocessors: bits are equal on the same kind of
    GPU at the same batch size.
    """
    op = "group_norm_silu"
    require(x.ndim >= 3, op, "x must be (N, C, *spatial), not {}", tuple(x.shape))
    require(x.is_floating_point(), op, "x must have a floating-point dtype, not {}", x.dtype)
    channels = x.shape[1]
    if second is not None:
        size, found = (x.shape[0], *x.shape[2:]), (second.shape[0], *second.shape[2:])
        require(
            second.ndim == x.ndim and size == found,
            op,
            "second must match x {} but for the channels, not {}",
            tuple(x.shape),
            tuple(second.shape),
        )
        require(second.dtype == x.dtype, op, "second must have x's dtype {}, not {}", x.dtype, second.dtype)
        channels += second.shape[1]
    require(groups > 0, op, "groups must be positive, not {}", groups)
    require(channels % groups == 0, op, "{} channels are not a multiple of {} groups", channels, groups)
    for name, tensor in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        fits = tensor is None or tensor.shape == (channels,)
        require(fits, op, "{} must be ({},), not {}", name, channels, tuple(getattr(tensor, "shape", ())))
    for name, optional in (("scale", scale), ("shift", shift)):
        fits = optional is None or optional.shape == (x.shape[0], channels)
        require(
            fits,
            op,
            "{} must be (N, C) = {}, not {}",
            name,
            (x.shape[0], channels),
            tuple(getattr(optional, "shape", ())),
        )
    layer = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "input_bias": input_bias}
    require_one_device(op, x, second=second, **layer)
    run = choose(op, backend, IMPLEMENTATIONS, x, _refusal(channels * math.prod(x.shape[2:]), *layer.values()))
    # Autocast would run the norm, and with it everything after, in fp32. Here x's dtype decides the precision.
    with without_autocast(x):
        return run(x, weight, bias, groups, eps, scale, shift, silu, input_bias, with_input, second)


def _refusal(values: int, *layer: Tensor | None) -> str:
    """The reason why no kernel supports so many values a sample, these weights or conditions, or an empty string."""
    if values > 2**31:
        return f"takes at most 2^31 values a sample, not {values:,}"
    for tensor in layer:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes weight, biases, scale and shift in fp32, fp16 and bf16, not in {tensor.dtype}"
    return ""
