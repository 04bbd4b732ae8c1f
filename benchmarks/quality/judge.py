"""The judge of a data set: a small convolutional classifier, trained on real images, whose features compare samples.

Its accuracy on real images that it has not learned is measured, and it judges nothing below ACCURACY.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.benchmarks.quality.pictures import PARTS, Pictures, Source, read_pictures
from fastdiff.evaluation.extractors import Extracted, Extractor
from fastdiff.runtime.files import replacing

ACCURACY = 0.98
"""The least share of held-out real images that a judge names rightly."""

_VERSION = 1  # of the network and its training: another one trains the judges again
_BATCH = 64
_LR = 2e-3
_WIDTHS = (24, 48, 96)


class Network(nn.Module):
    """Convolutions that halve the image down to 4 pixels, each with batch norm and ReLU; the mean over places; a linear
    layer."""

    def __init__(self, num_classes: int, size: int) -> None:
        super().__init__()
        halvings = round(math.log2(size / 4))
        widths = [3, *_WIDTHS, *_WIDTHS[-1:] * (halvings - 3)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features (N, 96) and logits (N, K) of uint8 images (N, 3, H, W)."""
        features = self.layers(images.float() / 127.5 - 1).mean((2, 3))
        return features, self.output(features)


class Judge(Extractor):
    """A trained network with the ``class_names`` of its outputs; ``accuracy`` is that on held-out real images."""

    resizing = "not at all"
    family = "judge"
    gives_probabilities = True

    def __init__(self, source: Source, network: Network, class_names: tuple[str, ...], accuracy: float) -> None:
        self.name, self.class_names, self.accuracy = f"judge of {source.name}", class_names, accuracy
        self._network = network.eval()
        digest = hashlib.sha256()
        for value in network.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        self.sha256 = digest.hexdigest()

    def _extract(self, images: Tensor) -> Extracted:
        features, logits = self._network(images)
        return Extracted(features, probabilities=logits.softmax(dim=1))


def open_judge(
    source: Source,
    folder: Path,
    device: torch.device | str = "cpu",
    tell: Callable[[str], None] = print,
) -> Judge:
    """The judge of the data set whose parts are in ``folder``, which keeps its weights, too; else it is trained first.

    ValueError if its accuracy is below ACCURACY.
    """
    path = folder / "judge.safetensors"
    parts = {part: read_pictures(folder / part) for part in PARTS}
    learned, checked = parts[source.judge_learns], parts[source.judge_checked_on]
    digests = " ".join(part.digest for part in parts.values())
    made_of = hashlib.sha256(f"{_VERSION} {source.judge_updates} {digests}".encode()).hexdigest()
    network = Network(len(learned.class_names), source.size)
    if not _load(network, path, made_of):
        tell(f"training the judge of {source.name} on {len(learned.images):,} real images ...")
        train(network, learned, flips=source.flips, updates=source.judge_updates)
        with replacing(path) as temporary:
            save_file(network.state_dict(), temporary, {"made_of": made_of})
    accuracy = accuracy_of(network, checked)
    if accuracy < ACCURACY:
        path.unlink()
        raise ValueError(
            f"the judge of {source.name} names {accuracy:.1%} of {len(checked.images):,} held-out real images "
            f"rightly, less than {ACCURACY:.0%}: it cannot judge samples"
        )
    return Judge(source, network.to(device), learned.class_names, accuracy)


def _load(network: Network, path: Path, made_of: str) -> bool:
    """Whether the file holds the weights of a judge that was made so; they are then the network's."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("made_of") != made_of:
                return False
            network.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  # not a dict
    except SafetensorError:  # damaged
        return False
    return True


def train(network: Network, pictures: Pictures, flips: bool, updates: int) -> None:
    """Train the network on the pictures, moved and turned at random, with a rate that rises and falls in one cycle."""
    generator = torch.Generator().manual_seed(0)
    _initialise(network, generator)
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(pictures.labels)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, updates)
    network.train()
    for _ in range(updates):
        rows = torch.randint(len(images), (_BATCH,), generator=generator)
        _, logits = network(_moved(images[rows], flips, generator))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def _initialise(network: Network, generator: torch.Generator) -> None:
    """He's initial weights (2015), from the generator and not PyTorch's global one."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(network.output.bias)


def _moved(images: Tensor, flips: bool, generator: torch.Generator) -> Tensor:
    """The images turned by up to 0.2 radians, scaled by up to 1.25, shifted by up to a tenth, in other light, float."""
    count = len(images)
    angle, scale, shift_x, shift_y, light, contrast = torch.rand(6, count, generator=generator) * 2 - 1
    angle, scale, light, contrast = 0.2 * angle, 1.25**scale, 20 * light, 1.2**contrast
    mirror = torch.randint(2, (count,), generator=generator) * 2 - 1 if flips else torch.ones(count)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos * mirror, -sin, 0.2 * shift_x, sin * mirror, cos, 0.2 * shift_y], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return ((moved - 127.5) * contrast[:, None, None, None] + 127.5 + light[:, None, None, None]).clamp(0, 255)


@torch.inference_mode()
def accuracy_of(network: Network, pictures: Pictures) -> float:
    """The share of the pictures whose class the network names; it is in evaluation mode then."""
    network.eval()
    images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2)
    named = torch.cat([network(part)[1].argmax(1) for part in images.split(256)])
    return share_named(named.numpy(), pictures.labels)


def share_named(named: NDArray[np.int64], asked: NDArray[np.int64]) -> float:
    """The share of the images that are named as they should be."""
    return float((named == asked).mean())
