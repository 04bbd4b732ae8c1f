"""A UNet that sees a low-resolution image beside the noisy one (Nichol & Dhariwal 2021, section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.unet import Features, UNet


class SuperResUNet(UNet):
    """Predicts as UNet does, given the low-resolution image, which it enlarges to x's size and stacks onto x."""

    in_channels = 6

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """As UNet.forward, with low_res: (N, 3, h, w) in [-1, 1], which must be given."""
        return super().forward(_beside(x, low_res), timesteps, y)

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None
    ) -> Features:
        """As UNet.get_feature_vectors, with low_res as forward's."""
        return super().get_feature_vectors(_beside(x, low_res), timesteps, y)


def _beside(x: Tensor, low_res: Tensor | None) -> Tensor:
    """The noisy images with the low-resolution ones, enlarged to their size, as further channels. (N, 6, H, W)"""
    if low_res is None:
        raise ValueError("a super-resolution model needs low_res, the low-resolution images")
    return torch.cat([x, F.interpolate(low_res, x.shape[2:], mode="bilinear")], dim=1)


def low_resolution(images: Tensor, size: int) -> Tensor:
    """What a super-resolution model enlarges to ``images`` (N, C, H, W): the means over areas, (N, C, size, size)."""
    return F.interpolate(images, size, mode="area")
