"""A UNet that sees a low-resolution image beside the noisy one (Nichol & Dhariwal 2021, section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.models.unet import UNet


class SuperResUNet(UNet):
    """Predicts as UNet does, given the low-resolution image, which it enlarges to x's size and stacks onto x."""

    in_channels = 6

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, low_res: Tensor | None = None) -> Tensor:
        """As UNet.forward, with low_res: (N, 3, h, w) in [-1, 1], which must be given."""
        if low_res is None:
            raise ValueError("a super-resolution model needs low_res, the low-resolution images")
        enlarged = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, enlarged], dim=1), timesteps, y)
