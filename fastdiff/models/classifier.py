"""The classifier of noisy images that guides sampling (Dhariwal & Nichol 2021, section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import kernels
from fastdiff.config import ClassifierConfig, ClassifierPool, Kernels, MemoryFormat
from fastdiff.config.classifier import HEAD_CHANNELS
from fastdiff.models.layers import GroupNormSiLU, QKVLinear, TokenLinear, zeroed
from fastdiff.models.unet import Encoder

_HIDDEN = 2048
"""The width of the hidden layer of the spatial pools."""


class Classifier(Encoder):
    """Logits of the class of a noisy image: the downsampling half of a UNet, its middle block, and a pool.

    State-dict keys, shapes and values are guided-diffusion's.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        kernels: Kernels | str = Kernels.AUTO,
        memory_format: MemoryFormat | str = MemoryFormat.CONTIGUOUS,
    ) -> None:
        encoder = config.encoder()
        super().__init__(encoder, kernels, in_channels=3)
        self.config = config
        width, classes = encoder.widths[-1], config.num_classes
        self.out: nn.Module
        match config.classifier_pool:
            case ClassifierPool.ATTENTION:
                side = config.image_size >> (len(encoder.widths) - 1)
                pool = AttentionPool(side, width, classes, kernels)
                self.out = nn.Sequential(GroupNormSiLU(width, kernels), nn.Identity(), pool)
            case ClassifierPool.ADAPTIVE:
                self.out = nn.Sequential(
                    GroupNormSiLU(width, kernels),
                    nn.Identity(),
                    nn.AdaptiveAvgPool2d(1),
                    zeroed(nn.Conv2d(width, classes, 1)),
                    nn.Flatten(),
                )
            case ClassifierPool.SPATIAL:
                self.out = nn.Sequential(
                    nn.Linear(sum(self.skips) + width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, classes)
                )
            case ClassifierPool.SPATIAL_V2:
                self.out = nn.Sequential(
                    nn.Linear(sum(self.skips) + width, _HIDDEN),
                    GroupNormSiLU(_HIDDEN, kernels),
                    nn.Identity(),
                    nn.Linear(_HIDDEN, classes),
                )
        self.lay_out(memory_format)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (N, K) of the classes of x (N, 3, H, W) in [-1, 1] at timesteps (N,), in x's dtype."""
        h, skips = self.encode(x, self.conditions(self.embed(timesteps)))
        if self.config.classifier_pool in (ClassifierPool.SPATIAL, ClassifierPool.SPATIAL_V2):
            h = torch.cat([block.mean(dim=(2, 3)) for block in (*skips, h)], dim=1)
        return self.out(h).to(x.dtype)


class AttentionPool(nn.Module):
    """Multi-head attention of the mean token over all pixels (after Radford et al. 2021, CLIP's attention pooling)."""

    def __init__(self, side: int, channels: int, classes: int, backend: str) -> None:
        super().__init__()
        self.heads = channels // HEAD_CHANNELS
        self.backend = backend
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = QKVLinear(channels, self.heads, new_order=True)
        self.c_proj = TokenLinear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        tokens = x.flatten(2).transpose(1, 2)  # (N, T, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.T.to(tokens.dtype)
        h = kernels.attention(self.qkv_proj(tokens), self.heads, backend=self.backend)
        pooled = h[:, 0]  # the mean token's
        return F.linear(pooled, self.c_proj.weight.squeeze(-1), self.c_proj.bias)
