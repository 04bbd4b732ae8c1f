"""An extractor that takes no time: the mean colour of each quarter of an image."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.evaluation.extractors import Extracted, Extractor

DIMENSIONS = 12


class Quarters(nn.Module):
    """(N, 3, H, W) -> (N, 12 times ``copies``)."""

    def __init__(self, copies: int = 1) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 2).flatten(1).repeat(1, self.copies)


class Colours(Extractor):
    """The same as an extractor; ``family`` "" gives the figures Inception's names."""

    name, sha256, resizing = "colours", hashlib.sha256(b"colours").hexdigest(), "their size"

    def __init__(self, family: str = "Colours", spatial: bool = False, probabilities: bool = False) -> None:
        self.family, self.gives_spatial, self.gives_probabilities = family, spatial, probabilities
        self.seen = 0

    def _extract(self, images: Tensor) -> Extracted:
        self.seen += len(images)
        features = Quarters()(images.float() / 255)
        return Extracted(
            features,
            features[:, ::2] if self.gives_spatial else None,
            features.softmax(1) if self.gives_probabilities else None,
        )


def program(path: Path, copies: int = 1) -> Path:
    """The same as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Quarters(copies)).save(str(path))
    return path


def pictures(count: int, size: int = 8, seed: int = 0, shift: int = 0) -> np.ndarray:
    """uint8 (N, size, size, 3), of correlated colours."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 200, (count, 1, 1, 3))
    return np.clip(base + rng.integers(0, 56, (count, size, size, 3)) + shift, 0, 255).astype(np.uint8)
