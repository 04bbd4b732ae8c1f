"""A model with what it begins from: noise, other noise, small images, or another model that draws these."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.data import normalised
from fastdiff.sampling.base_samples import BaseSamples
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.generate import Int64Array, OfImages, Uint8Array


@dataclass(frozen=True)
class Pipeline:
    """An engine with what it begins from.

    ``base`` are the small images of a super-resolution model, or the engine that draws them (a cascade: Nichol &
    Dhariwal 2021, section 4); ``start`` gives x_T where it is not noise.
    """

    engine: Engine
    base: BaseSamples | Engine | None = None
    start: OfImages | None = None

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
            low_res = lambda _: normalised(torch.from_numpy(next(small)))  # noqa: E731
        elif self.base is not None:
            low_res = self._given
        return self.engine.draw(indices, labels, low_res=low_res, start=self.start, on_step=on_step)

    def trajectory(self, index: int, label: int | None, most: int) -> Uint8Array:
        """The image ``index`` on its way from noise: at ``most`` so many frames (F, H, W, 3), evenly spread."""
        low_res: OfImages | None = self._given if self.base is not None else None
        if isinstance(self.base, Engine):
            small = normalised(torch.from_numpy(self.base.trajectory(index, label, 1)))
            low_res = lambda _: small  # noqa: E731
        return self.engine.trajectory(index, label, most, low_res=low_res, start=self.start)

    def _given(self, numbers: Int64Array) -> Tensor:
        assert isinstance(self.base, BaseSamples)
        return normalised(torch.from_numpy(self.base.batch(numbers)))


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """From one x_T (1, 3, H, W) to another along the sphere (Shoemake 1985): (n, 3, H, W) for ``weights`` (n,).

    On a straight way between them noise would become too weak.
    """
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights.view(-1, 1, 1, 1).to(first)
    if float(angle) < 1e-4:
        return torch.lerp(first, second, w)
    return (torch.sin((1 - w) * angle) * first + torch.sin(w * angle) * second) / torch.sin(angle)
