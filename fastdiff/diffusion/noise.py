"""Noise that is given rather than drawn."""

import itertools
from collections.abc import Iterable, Iterator

from torch import Tensor


def draws_of(step_noise: Tensor | Iterable[Tensor] | None) -> Iterator[Tensor | None]:
    """One tensor a step, or None without end; ValueError where the tensors end before the steps do."""
    if step_noise is None:
        yield from itertools.repeat(None)
    else:
        yield from step_noise
        raise ValueError("step_noise must have one tensor for every timestep, and has fewer")
