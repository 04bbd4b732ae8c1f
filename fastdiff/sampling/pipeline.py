"""A model with what it begins from: noise, other noise, small images, or another model that draws these."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data import normalised
from fastdiff.sampling.base_samples import BaseSamples
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.generate import Int64Array, OfImages, Stopped
from fastdiff.sampling.output import Uint8Array


@dataclass(frozen=True)
class Pipeline:
    """An engine with what it begins from.

    ``base`` are the small images of a super-resolution model, or the engine that draws them (a cascade: Nichol &
    Dhariwal 2021, section 4); ``start`` gives x_T where it is not noise. ``upper_labels`` gives the engine's numbers
    of the classes (N,) that a base numbers its own way.
    """

    engine: Engine
    base: BaseSamples | Engine | None = None
    start: OfImages | None = None
    upper_labels: Callable[[Int64Array], Int64Array] | None = None

    @property
    def steps(self) -> int:
        """Steps that an image takes."""
        return self.engine.steps + (self.base.steps if isinstance(self.base, Engine) else 0)

    def draw(
        self, indices: Int64Array, labels: Int64Array | None = None, on_step: Callable[[int], None] | None = None
    ) -> Iterator[Uint8Array]:
        """Yield the images ``indices`` (N,) of the classes ``labels`` (N,), uint8 (n, H, W, 3).

        ``on_step`` is told after each step how many images took it.
        """
        low_res: OfImages | None = None
        if isinstance(self.base, Engine):
            small = self.base.draw(indices, labels, on_step=on_step)  # cut into the same batches
            low_res = partial(_next_of, small)
        elif self.base is not None:
            low_res = self._given
        if labels is not None and self.upper_labels is not None:
            labels = self.upper_labels(labels)
        return self.engine.draw(indices, labels, low_res=low_res, start=self.start, on_step=on_step)

    def trajectory(self, index: int, label: int | None, most: int) -> Uint8Array:
        """The image ``index`` on its way from noise: at ``most`` so many frames (F, H, W, 3), evenly spread."""
        low_res: OfImages | None = self._given if self.base is not None else None
        if isinstance(self.base, Engine):
            small = normalised(torch.from_numpy(self.base.trajectory(index, label, 1)))
            low_res = lambda _: small  # noqa: E731
        if label is not None and self.upper_labels is not None:
            label = int(self.upper_labels(np.array([label]))[0])
        return self.engine.trajectory(index, label, most, low_res=low_res, start=self.start)

    def _given(self, numbers: Int64Array) -> Tensor:
        assert isinstance(self.base, BaseSamples)
        return normalised(torch.from_numpy(self.base.batch(numbers)))


def _next_of(batches: Iterator[Uint8Array], numbers: Int64Array) -> Tensor:
    """The next batch of small images, filled up to as many as ``numbers`` has; Stopped where there is none."""
    if (images := next(batches, None)) is None:
        raise Stopped
    return normalised(torch.from_numpy(images[np.arange(len(numbers)) % len(images)]))


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """From one x_T (1, 3, H, W) to another along the sphere (Shoemake 1985): (n, 3, H, W) for ``weights`` (n,).

    On a straight way between them noise would become too weak.
    """
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights.view(-1, 1, 1, 1)
    near = angle < 1e-4  # where sines are no longer to be divided
    of_first = torch.where(near, 1 - w, torch.sin((1 - w) * angle) / torch.sin(angle))
    of_second = torch.where(near, w, torch.sin(w * angle) / torch.sin(angle))
    return of_first * first + of_second * second
