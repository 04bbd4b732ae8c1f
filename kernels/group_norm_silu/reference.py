"""What group_norm_silu means: GroupNorm in fp32, then scale and shift, then SiLU, one after the other."""

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
) -> Tensor:
    """The definition, see op.py. Computes in fp32, or in float64 where x is float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps).to(x.dtype)
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if scale is not None:
        y = y * (1 + scale.to(x.dtype).view(per_channel))
    if shift is not None:
        y = y + shift.to(x.dtype).view(per_channel)
    return F.silu(y) if silu else y
