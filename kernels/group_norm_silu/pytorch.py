"""group_norm_silu with the best that stock PyTorch offers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.group_norm_silu.reference import steady


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """See op.py. Everything in fp32 with one rounding at the end, which torch.compile makes one pass.

    Eagerly on a CPU this is the fastest way too: PyTorch's GroupNorm in bf16 is slower than in fp32.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        from fastdiff.kernels.group_norm_silu import inductor  # it imports the compiler, which takes seconds

        return inductor.group_norm_silu(x, weight, bias, groups, eps, scale, shift, silu)
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    if not torch.compiler.is_compiling():  # Inductor's own statistics are steady
        wide = steady(wide, groups)
    y = torch.group_norm(wide, groups, weight.to(dtype), bias.to(dtype), eps)
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if scale is not None:
        y = y * (1 + scale.to(dtype).view(per_channel))
    if shift is not None:
        y = y + shift.to(dtype).view(per_channel)
    return (F.silu(y) if silu else y).to(x.dtype)
