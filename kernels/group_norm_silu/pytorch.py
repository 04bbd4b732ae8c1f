"""group_norm_silu with the best that stock PyTorch offers."""

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
    """See op.py. F.group_norm takes statistics in fp32 whatever x is, and torch.compile fuses what follows it."""
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    per_channel = (*x.shape[:2], *[1] * (x.ndim - 2))
    if scale is not None:
        y = y * (1 + scale.to(x.dtype).view(per_channel))
    if shift is not None:
        y = y + shift.to(x.dtype).view(per_channel)
    return F.silu(y) if silu else y
