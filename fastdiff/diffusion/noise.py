"""Noise that the caller supplies instead of fresh noise."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastdiff.kernels import Backend, philox_normal
from fastdiff.kernels.philox import pytorch


@dataclass(frozen=True)
class Philox:
    """Noise that depends only on seed, image number, step and element (fastdiff.kernels.philox).

    ``samples`` (N,) int64 are the batch's image numbers, on the device. Step 0 generates x_T, and step k the noise of a
    loop's k-th update.
    """

    seed: int
    samples: Tensor

    def of_start(self, shape: Sequence[int], backend: Backend) -> Tensor:
        """x_T, (N, ...) fp32."""
        return philox_normal(self.seed, self.samples, 0, shape[1:], backend=backend)

    def of_update(self, step: Tensor, shape: Sequence[int]) -> Tensor:
        """The noise of the updates ``step`` (N,), (N, ...) fp32; diffusion_step generates the same noise itself."""
        return pytorch.philox_normal(self.seed, self.samples, step, math.prod(shape[1:])).view(*shape)


def draws_of(step_noise: Tensor | Iterable[Tensor] | None) -> Iterator[Tensor | None]:
    """Yield one tensor per step, or None forever; ValueError if there are fewer tensors than steps."""
    if step_noise is None:
        yield from itertools.repeat(None)
    else:
        yield from step_noise
        raise ValueError("step_noise must have one tensor for every timestep, but has fewer")
