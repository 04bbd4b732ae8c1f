"""The Inception network of the FID: TensorFlow's of 2015-12-05, to be read top to bottom.

It is Inception v3 (Szegedy et al. 2016) with 1008 classes and, unlike torchvision's, with average pools that do not
count the padding, but for the last pool, which takes the maximum. Parameters have the names of torchvision, which
pytorch-fid and torch-fidelity keep in their translations of the released weights.
"""

from copy import deepcopy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIZE = 299
"""The height and width of its images."""
MEAN, DEVIATION = 128, 128
"""Of the levels 0 .. 255: the network takes (x - 128) / 128."""
_SPATIAL = 7  # channels that sFID takes: 17 * 17 * 7 = 2023 values, about as many as there are features

Kernel = int | tuple[int, int]
"""The size of a kernel, or its height and width."""
Step = tuple[int, Kernel] | tuple[int, Kernel, Kernel]
"""Channels and kernel of a convolution; with a second kernel, of two side by side."""
Branches = dict[str, list[Step]]


class Inception(nn.Module):
    """Images (N, 3, 299, 299), (x - MEAN) / DEVIATION -> features, spatial features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = _Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]})
        self.Mixed_6b = _mixed_6(128)
        self.Mixed_6c = _mixed_6(160)
        self.Mixed_6d = _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        self.Mixed_7a = _Mixed(
            768,
            {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]},
        )
        self.Mixed_7b = _mixed_7(1280)
        self.Mixed_7c = _mixed_7(2048, largest=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (N, 3, 299, 299) -> features (N, 2048), spatial features (N, 2023), logits without bias (N, 1008).

        The spatial features are the first channels of Mixed_6d, those of its 1x1 convolution, in the order H, W, C:
        TensorFlow's mixed_6/conv (Nash et al. 2021). The Inception score leaves the bias out (Salimans et al. 2016).
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
        spatial = x[:, :_SPATIAL].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (N, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (N, 2048, 8, 8)
        features = x.mean(dim=(2, 3))
        return features, spatial, features @ self.fc.weight.T

    def folded(self) -> Self:
        """A copy for evaluation, its batch norms folded into the convolutions, in channels_last."""
        copy = deepcopy(self).eval()
        for module in copy.modules():
            if isinstance(module, _Conv) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as PyTorch documents it


class _Conv(nn.Module):
    """A convolution, its batch norm, ReLU."""

    bn: nn.Module

    def __init__(self, channels: int, out: int, kernel: Kernel, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Branches of convolutions side by side, and a pool; the channels of all, one after the other.

    With ``pooled`` channels, which a 1x1 convolution behind the pool gives, the block keeps the size. Without them it
    halves the size: the last convolution of each branch has stride 2, and the pool takes the maximum.
    """

    def __init__(self, channels: int, branches: Branches, *, pooled: int = 0, largest: bool = False) -> None:
        super().__init__()
        self.halves, self.largest = not pooled, largest
        self.branches: list[list[list[str]]] = []  # of each branch the steps, of each step the convolutions
        for branch, steps in branches.items():
            within, names = channels, []
            for i, (out, *kernels) in enumerate(steps, start=1):
                name = branch if len(steps) == 1 else f"{branch}_{i}"
                names.append([name] if len(kernels) == 1 else [f"{name}a", f"{name}b"])
                halves = self.halves and i == len(steps)
                for each, kernel in zip(names[-1], kernels, strict=True):
                    self.add_module(each, _Conv(within, out, kernel, stride=1 + halves, padded=not halves))
                within = out
            self.branches.append(names)
        if pooled:
            self.branch_pool = _Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        found = []
        for branch in self.branches:
            y = x
            for names in branch:
                each = [self.get_submodule(name)(y) for name in names]
                y = each[0] if len(each) == 1 else torch.cat(each, dim=1)
            found.append(y)
        if self.halves:
            found.append(F.max_pool2d(x, 3, stride=2))
        elif self.largest:
            found.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            found.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(found, dim=1)


def _mixed_5(channels: int, pooled: int) -> _Mixed:
    branches: Branches = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return _Mixed(channels, branches, pooled=pooled)


def _mixed_6(within: int) -> _Mixed:
    across, down = (1, 7), (7, 1)
    branches: Branches = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(within, 1), (within, across), (192, down)],
        "branch7x7dbl": [(within, 1), (within, down), (within, across), (within, down), (192, across)],
    }
    return _Mixed(768, branches, pooled=192)


def _mixed_7(channels: int, *, largest: bool = False) -> _Mixed:
    across, down = (1, 3), (3, 1)
    branches: Branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, across, down)],
        "branch3x3dbl": [(448, 1), (384, 3), (384, across, down)],
    }
    return _Mixed(channels, branches, pooled=192, largest=largest)
