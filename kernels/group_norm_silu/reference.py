"""The definition of group_norm_silu: GroupNorm in fp32, then scale and shift, then SiLU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
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
    """The definition, see op.py. Computes in fp32, or in float64 if x is float64."""
    dtype, sources = torch.promote_types(x.dtype, torch.float32), (x,) if second is None else (x, second)
    x = joined(x, second)
    if input_bias is not None:
        x = x + input_bias.to(x.dtype).view(-1, *[1] * (x.ndim - 2))
    # not F.group_norm, which rejects a group of one value, whose norm is the bias
    y = torch.group_norm(steady(x.to(dtype), groups), groups, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if scale is not None:
        y = y * (1 + scale.to(x.dtype).view(per_channel))
    if shift is not None:
        y = y + shift.to(x.dtype).view(per_channel)
    y = F.silu(y) if silu else y
    return (y, *sources) if with_input else y


def joined(x: Tensor, second: Tensor | None) -> Tensor:
    """Both, one after the other along the channels, in x's layout."""
    if second is None:
        return x
    if is_channels_last(x):
        second = second.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, second], dim=1)


def is_channels_last(x: Tensor) -> bool:
    """Whether x is in channels_last and not as well contiguous."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def steady(x: Tensor, groups: int) -> Tensor:
    """x minus one value of each group, which a norm cancels, so that PyTorch's norm is accurate in every layout.

    For channels_last tensors on a CPU, PyTorch's variance is E[x^2] - E[x]^2: at x = 10000 +- 0.1 it loses all digits.
    """
    if x.device.type != "cpu" or x.is_contiguous():
        return x
    channels_per_group = x.shape[1] // groups
    first = x.detach().flatten(2)[:, ::channels_per_group, :1]  # (N, G, 1)
    return x - first.repeat_interleave(channels_per_group, 1).view(*x.shape[:2], *[1] * (x.ndim - 2))
