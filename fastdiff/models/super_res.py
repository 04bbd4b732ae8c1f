"""The super-resolution UNet, conditioned on a low-resolution image (Nichol & Dhariwal 2021, section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.unet import Features, UNet


class SuperResUNet(UNet):
    """A UNet whose input is x concatenated with the low-resolution image, upsampled to x's size."""

    in_channels = 6

    def forward(  # type: ignore[override]  # one more input
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Like UNet.forward, with the required low_res: (N, 3, h, w) in [-1, 1]."""
        return super().forward(_beside(x, low_res), timesteps, y, augment)

    def get_feature_vectors(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        low_res: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Features:
        """Like UNet.get_feature_vectors, with low_res as in forward."""
        return super().get_feature_vectors(_beside(x, low_res), timesteps, y, augment)


def _beside(x: Tensor, low_res: Tensor | None) -> Tensor:
    """Concatenate the noisy images with the low-resolution ones, upsampled to the same size. (N, 6, H, W)"""
    if low_res is None:
        raise ValueError("a super-resolution model needs low_res, the low-resolution images")
    return torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)


def low_resolution(images: Tensor, size: int) -> Tensor:
    """Downsample ``images`` (N, C, H, W) by area averaging to a super-resolution model's input, (N, C, size, size)."""
    return F.interpolate(images, size, mode="area")
