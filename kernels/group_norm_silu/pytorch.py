"""group_norm_silu with the fastest operations of stock PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.group_norm_silu.reference import is_channels_last, joined, steady

FEW_CHANNELS_PER_GROUP = 2
"""Up to these PyTorch's GroupNorm on a CPU takes up to ten times as long in channels_last: it sums over a group's
channels. Two changes of the layout cost less."""


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
    """See op.py. Computes in fp32 with one rounding at the end; torch.compile fuses it into one pass.

    This is also the fastest way in eager mode on a CPU: PyTorch's GroupNorm is slower in bf16 than in fp32.
    """
    dtype, sources = torch.promote_types(x.dtype, torch.float32), (x,) if second is None else (x, second)
    x = joined(x, second)
    wide = x.to(dtype)
    if input_bias is not None:
        wide = wide + input_bias.to(dtype).view(-1, *[1] * (x.ndim - 2))
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        from fastdiff.kernels.group_norm_silu import inductor  # imports the compiler, which takes seconds

        of = x if input_bias is None else wide
        y = inductor.group_norm_silu(of, weight, bias, groups, eps, scale, shift, silu).to(x.dtype)
        return (y, *sources) if with_input else y
    few = x.device.type == "cpu" and x.shape[1] // groups <= FEW_CHANNELS_PER_GROUP and is_channels_last(x)
    if few:
        wide = wide.contiguous()
    elif not torch.compiler.is_compiling():  # Inductor's statistics are numerically stable
        wide = steady(wide, groups)
    y = torch.group_norm(wide, groups, weight.to(dtype), bias.to(dtype), eps)
    if few:
        y = y.contiguous(memory_format=torch.channels_last)
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if scale is not None:
        y = y * (1 + scale.to(dtype).view(per_channel))
    if shift is not None:
        y = y + shift.to(dtype).view(per_channel)
    y = (F.silu(y) if silu else y).to(x.dtype)
    return (y, *sources) if with_input else y
