"""The FID network against torch-fidelity 0.4.0, its resizing against TensorFlow's definition, its weights by file."""

import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.evaluation import extractors
from fastdiff.evaluation.extractors import INCEPTION, open_extractor
from fastdiff.evaluation.inception import DEVIATION, MEAN, SIZE, Inception
from fastdiff.evaluation.resizing import resized_like_tensorflow

from ..support import refusal

PARTS = ("features", "spatial", "logits")
SIZES = (32, 333)  # pixels of the judged images: one grows, the other shrinks


def judged(size: int) -> dict[str, Tensor]:
    """What torch-fidelity's network gives in float64 for image_of(size), with the weights of weight_of.

    Its feature_extractor_internal_dtype="float64" means fp32, so the network was converted by hand. It has no spatial
    features: those are the output of its Mixed_6d.branch1x1.
    """
    with np.load(Path(__file__).with_name("inception.npz")) as stored:
        return {part: torch.from_numpy(stored[f"{part}_{size}"]).double() for part in PARTS}


def image_of(size: int) -> Tensor:
    """A picture by a formula, uint8 (1, 3, size, size)."""
    c, y, x = torch.meshgrid(torch.arange(3), torch.arange(size), torch.arange(size), indexing="ij")
    return ((7 * x + 5 * (c + 2) * y + x * y // (c + 3)) % 256).to(torch.uint8)[None]


def weight_of(key: str, shape: tuple[int, ...]) -> Tensor:
    """Weights by a rule, which the judge had, too: random, in the scale that keeps values in theirs."""
    noise = np.random.default_rng(zlib.crc32(key.encode())).random(shape) * 2 - 1
    if len(shape) == 4:
        noise *= np.sqrt(6 / np.prod(shape[1:]))
    elif key == "fc.weight":
        noise *= 0.02
    elif key.endswith(("bn.weight", "running_var")):
        noise = 1 + 0.5 * noise
    else:
        noise *= 0.25
    return torch.from_numpy(np.asarray(noise)).float()


@pytest.fixture(scope="module")
def network() -> Inception:
    """The network with the judge's weights."""
    network = Inception().eval()
    state = network.state_dict()
    network.load_state_dict(
        {key: weight_of(key, tuple(v.shape)) if v.is_floating_point() else v for key, v in state.items()}
    )
    return network


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, in units of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_the_network_is_torch_fidelitys(network: Inception, size: int) -> None:
    # The place between two pixels is in float32, as in TensorFlow; the judge's was in float64.
    x = (resized_like_tensorflow(image_of(size).double(), SIZE) - MEAN) / DEVIATION
    found = dict(zip(PARTS, network.double()(x), strict=True))
    network.float()
    for part, wanted in judged(size).items():
        assert found[part].shape == (1, len(wanted))
        assert difference(found[part][0], wanted) < 2e-5, part


def test_weights_by_file_give_its_features(network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the released weights' figures are called FID."""
    path = tmp_path / "downloaded.pth"
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, path)
    extractor = open_extractor(path)
    assert (extractor.name, extractor.family) == ("downloaded", "downloaded")
    monkeypatch.setitem(extractors.KNOWN, extractor.sha256, INCEPTION)
    extractor = open_extractor(path)
    assert (extractor.name, extractor.family) == ("inception-2015-12-05", "")
    assert extractor.gives_spatial
    assert extractor.gives_probabilities
    assert extractor.resizing == "299 pixels, bilinear (TensorFlow 1's)"
    found, wanted = extractor(image_of(32)), judged(32)
    assert found.spatial is not None
    assert found.probabilities is not None
    assert found.features.dtype == found.spatial.dtype == found.probabilities.dtype == torch.float32
    assert difference(found.features[0], wanted["features"]) < 1e-4
    assert difference(found.spatial[0], wanted["spatial"]) < 1e-4
    assert difference(found.probabilities[0], wanted["logits"].softmax(dim=0)) < 1e-3  # an error in a logit is relative


def resized_by_definition(row: list[int], size: int) -> list[float]:
    found = []
    for i in range(size):
        at = Fraction(i * len(row), size)
        below = int(at)
        above = min(below + 1, len(row) - 1)
        found.append(float(row[below] + (row[above] - row[below]) * (at - below)))
    return found


@pytest.mark.parametrize("length", [1, 2, 7, 32, 299, 640])
def test_pixels_are_interpolated_where_tensorflow_puts_them(length: int) -> None:
    row = [(37 * i * i + 11) % 256 for i in range(length)]
    wanted = torch.tensor(resized_by_definition(row, SIZE), dtype=torch.float64)
    levels = torch.tensor(row, dtype=torch.float64)
    across = resized_like_tensorflow(levels.expand(1, 1, 2, length), SIZE)[0, 0]
    down = resized_like_tensorflow(levels[:, None].expand(1, 1, length, 2), SIZE)[0, 0].T
    assert across.shape == (SIZE, SIZE)
    for found in (across, down):
        assert (found - wanted).abs().max() < 0.01  # of 256: the place is in float32


def test_other_weights_of_this_name_are_refused(tmp_path: Path) -> None:
    other = {"Mixed_7c.branch_pool.conv.weight": torch.zeros(192, 2048, 1, 1), "AuxLogits.fc.bias": torch.zeros(1000)}
    torch.save(other, tmp_path / "inception_v3_google.pth")
    said = refusal(lambda: open_extractor(tmp_path / "inception_v3_google.pth"))
    assert "has not the weights of this network" in said
    assert "tensors differ" in said
