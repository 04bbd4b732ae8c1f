"""A model with its starting point: noise, interpolated noise, small images, or another model that draws these."""

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
from fastdiff.sampling.generate import Int64Array, OfImages, StopSampling
from fastdiff.sampling.output import Uint8Array


@dataclass(frozen=True)
class Pipeline:
    """An engine with its starting point.

    ``base`` holds the small images for a super-resolution model, or is the engine that draws them (a cascade: Nichol &
    Dhariwal 2021, section 4). ``start`` gives x_T if it is not noise. ``upper_labels`` converts class indices (N,) of
    the base to those of the engine.
    """

    engine: Engine
    base: BaseSamples | Engine | None = None
    start: OfImages | None = None
    upper_labels: Callable[[Int64Array], Int64Array] | None = None

    @property
    def steps(self) -> int:
        """Sampling steps per image, including those of a base engine."""
        return self.engine.steps + (self.base.steps if isinstance(self.base, Engine) else 0)

    def draw(
        self, indices: Int64Array, labels: Int64Array | None = None, on_step: Callable[[int], None] | None = None
    ) -> Iterator[Uint8Array]:
        """Yield the images ``indices`` (N,) of the classes ``labels`` (N,), uint8 (n, H, W, 3).

        ``on_step`` is called after each step with the number of images that took it.
        """
        low_res: OfImages | None = None
        if isinstance(self.base, Engine):
            small = self.base.draw(indices, labels, on_step=on_step)  # split into the same batches
            low_res = partial(_next_of, small)
        elif self.base is not None:
            low_res = self._given
        if labels is not None and self.upper_labels is not None:
            labels = self.upper_labels(labels)
        return self.engine.draw(indices, labels, low_res=low_res, start=self.start, on_step=on_step)

    def trajectory(self, index: int, label: int | None, most: int) -> Uint8Array:
        """At most ``most`` evenly spread frames (F, H, W, 3) of the image ``index`` from x_T to x_0."""
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
    """The next batch of small images, padded to the length of ``numbers``; raises StopSampling if there is none."""
    if (images := next(batches, None)) is None:
        raise StopSampling
    return normalised(torch.from_numpy(images[np.arange(len(numbers)) % len(images)]))


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Interpolate spherically between two x_T (1, 3, H, W) (Shoemake 1985): (n, 3, H, W) for ``weights`` (n,).

    Linear interpolation would reduce the variance of the noise.
    """
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights.view(-1, 1, 1, 1)
    near = angle < 1e-4  # sin(angle) is too small to divide by
    of_first = torch.where(near, 1 - w, torch.sin((1 - w) * angle) / torch.sin(angle))
    of_second = torch.where(near, w, torch.sin(w * angle) / torch.sin(angle))
    return of_first * first + of_second * second
