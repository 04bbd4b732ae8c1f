"""GroupNorm, scale and shift, and SiLU as one operation."""

from fastdiff.kernels.group_norm_silu.op import group_norm_silu

__all__ = ["group_norm_silu"]
