"""EfficientNet-Lite0 (Tan and Le 2019, and the Lite variant of their TensorFlow code), to be read top to bottom.

The Lite variant has no squeeze-and-excitation, and ReLU6 in place of swish. Parameters have the names of the PyTorch
translation of the released weights, efficientnet-lite0-57934424.pth.
"""

from copy import deepcopy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIZE = 224
"""The height and width of its images."""
MEAN, DEVIATION = 127, 128
"""Of levels 0 .. 255: the Lite variant takes (x - 127) / 128 (efficientnet_lite_builder.py), no means of channels."""
_BLOCKS = (
    # repeats, kernel, stride, expansion, channels (Tan and Le 2019, table 1)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD, _CLASSES = 32, 1280, 1000


class EfficientNetLite0(nn.Module):
    """Images (N, 3, H, W), (x - MEAN) / DEVIATION -> features (N, 1280) and logits (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv2d(3, _STEM, 3, stride=2), _norm(_STEM)
        self._blocks = nn.ModuleList()
        channels = _STEM
        for repeats, kernel, stride, expansion, out in _BLOCKS:
            for i in range(repeats):
                self._blocks.append(_Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._conv_head, self._bn1 = _SameConv2d(channels, _HEAD, 1), _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (N, 3, H, W), multiples of 32. Features are the means over the last map, before the linear layer."""
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)  # (N, 32, H/2, W/2)
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)  # (N, 1280, H/32, W/32)
        features = x.mean(dim=(2, 3))
        return features, self._fc(features)

    def folded(self) -> Self:
        """A copy for evaluation, in channels_last: batch norms and uneven padding are folded into the convolutions."""
        copy = deepcopy(self).eval()
        for module in (copy, *copy._blocks):
            for conv, norm in _PAIRS:
                if hasattr(module, conv):
                    setattr(module, conv, _folded(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        return copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as PyTorch documents it


_PAIRS = (
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
)
"""Each convolution with the batch norm behind it."""


class _Block(nn.Module):
    """The inverted bottleneck of MobileNetV2: widen, convolve each channel, project; with a skip if sizes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.widens = expansion > 1
        if self.widens:
            self._expand_conv, self._bn0 = _SameConv2d(channels, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _SameConv2d(wide, wide, kernel, stride=stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _SameConv2d(wide, out, 1), _norm(out)
        self.skips = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.widens else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return y.add_(x) if self.skips else y


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME": where it halves an even size, one pixel more at the end."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(channels, out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W)."""
        if self.stride[0] == 2:
            before = self.kernel_size[0] // 2 - 1
            x = F.pad(x, (before, before + 1, before, before + 1))
        return super().forward(x)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution for both.

    A row and a column of zeros at the start of a kernel, with one pixel more of padding there, make the padding even:
    no padded copy of the image is needed.
    """
    both = fuse_conv_bn_eval(conv, norm)
    assert both.bias is not None
    kernel, padding = both.weight.detach(), conv.kernel_size[0] // 2
    if conv.stride[0] == 2:
        kernel = F.pad(kernel, (1, 0, 1, 0))
    out, channels, size, _ = kernel.shape
    folded = nn.Conv2d(
        channels * conv.groups, out, size, conv.stride[0], padding, groups=conv.groups, dtype=kernel.dtype
    )
    folded.load_state_dict({"weight": kernel, "bias": both.bias})
    return folded


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
