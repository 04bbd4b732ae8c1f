"""Noise that is given rather than drawn afresh."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastdiff.kernels import Backend, philox_normal
from fastdiff.kernels.philox import pytorch


@dataclass(frozen=True)
class Philox:
    """Noise that is a function of seed, image number, step and element alone (fastdiff.kernels.philox).

    ``samples`` (N,) int64 are the batch's image numbers, on the device. Step 0 draws x_T, and step k the noise of a
    loop's k-th update.
    """

    seed: int
    samples: Tensor

    def of_start(self, shape: Sequence[int], backend: Backend) -> Tensor:
        """x_T of the shape (N, ...), fp32."""
        return philox_normal(self.seed, self.samples, 0, shape[1:], backend=backend)

    def of_update(self, step: Tensor, shape: Sequence[int]) -> Tensor:
        """The noise of the updates ``step`` (N,), of the shape (N, ...), fp32; diffusion_step draws the same itself."""
        return pytorch.philox_normal(self.seed, self.samples, step, math.prod(shape[1:])).view(*shape)


def draws_of(step_noise: Tensor | Iterable[Tensor] | None) -> Iterator[Tensor | None]:
    """One tensor a step, or None without end; ValueError where the tensors end before the steps do."""
    if step_noise is None:
        yield from itertools.repeat(None)
    else:
        yield from step_noise
        raise ValueError("step_noise must have one tensor for every timestep, and has fewer")
