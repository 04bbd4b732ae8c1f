"""Conversion between pixels as stored and as a model sees them."""

import torch
from torch import Tensor


def normalised(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) as fp32 (N, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [-1, 1] as contiguous uint8 (N, H, W, 3), rounded towards zero as in improved-diffusion."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
