"""The fused operations of pixel-space diffusion models, usable on their own in any model.

Each takes ``backend="auto"|"triton"|"torch"|"reference"``; see ``backend.py`` for what these mean.
"""

from fastdiff.kernels.attention import attention
from fastdiff.kernels.backend import Backend
from fastdiff.kernels.diffusion_loss import diffusion_loss
from fastdiff.kernels.diffusion_step import diffusion_step
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.philox import philox_normal, philox_uint32

__all__ = [
    "Backend",
    "attention",
    "diffusion_loss",
    "diffusion_step",
    "group_norm_silu",
    "philox_normal",
    "philox_uint32",
]
