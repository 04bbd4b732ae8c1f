"""The public operation: checks the arguments and chooses the implementation."""

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
    with_input: Literal[True],
    backend: Backend | str = ...,
) -> tuple[Tensor, Tensor]: ...


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
    with_input: bool = False,
    backend: Backend | str = Backend.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = act(((x + input_bias - mean) * rstd * weight + bias) * (1 + scale) + shift), act SiLU or the identity.

    Group normalisation (Wu & He 2018) with the conditioning of Nichol & Dhariwal 2021, section 2. Mean and rstd are
    per sample and group, in fp32.

    x: (N, C, *spatial) of any floating-point dtype, contiguous or channels_last; weight, bias: (C,); scale, shift:
    (N, C) or None; input_bias: (C,) or None, such as that of the convolution before, which then needs no pass of its
    own. Returns y with x's shape, dtype and memory format, or with ``with_input`` (y, x): the backward kernel adds the
    gradient of that second output to that of x, for which autograd would need a pass of its own. ValueError if shapes
    or devices do not match, or the backend cannot run.

    The Triton kernels add in an order that depends on the number of multiprocessors: bits are equal on the same kind of
    GPU at the same batch size.
    """
    op = "group_norm_silu"
    require(x.ndim >= 3, op, "x must be (N, C, *spatial), not {}", tuple(x.shape))
    require(x.is_floating_point(), op, "x must have a floating-point dtype, not {}", x.dtype)
    channels = x.shape[1]
    require(groups > 0, op, "groups must be positive, not {}", groups)
    require(channels % groups == 0, op, "{} channels are not a multiple of {} groups", channels, groups)
    for name, tensor in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        fits = tensor is None or tensor.shape == (channels,)
        require(fits, op, "{} must be ({},), not {}", name, channels, tuple(getattr(tensor, "shape", ())))
    for name, optional in (("scale", scale), ("shift", shift)):
        fits = optional is None or optional.shape == x.shape[:2]
        require(
            fits, op, "{} must be (N, C) = {}, not {}", name, tuple(x.shape[:2]), tuple(getattr(optional, "shape", ()))
        )
    require_one_device(op, x, weight=weight, bias=bias, scale=scale, shift=shift, input_bias=input_bias)
    run = choose(op, backend, IMPLEMENTATIONS, x, _refusal(weight, bias, scale, shift, input_bias))
    # Autocast would run the norm, and with it everything after, in fp32. Here x's dtype decides the precision.
    with without_autocast(x):
        return run(x, weight, bias, groups, eps, scale, shift, silu, input_bias, with_input)


def _refusal(*layer: Tensor | None) -> str:
    """The reason why no kernel supports these weights and conditions, or an empty string."""
    for tensor in layer:
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"takes weight, biases, scale and shift in fp32, fp16 and bf16, not in {tensor.dtype}"
    return ""
