"""Decides which updates to skip: on the device, identically on every process, without a host sync."""

from collections.abc import Callable

import torch
from torch import Tensor

RATE = 0.99
"""Decay rate of the running mean loss, the reference for spikes."""

WARM = 100
"""Updates before a loss can count as a spike."""


class Guard:
    """Skips an update whose gradient or loss is not finite or, with ``factor``, whose loss is a spike.

    A spike exceeds ``factor`` times the running mean of the losses that were not skipped.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self.in_a_row = torch.zeros((), device=device)
        self._mean = torch.zeros((), device=device)
        self._seen = torch.zeros((), device=device)
        self.step = torch.full((), -1, device=device)
        """The last skipped update, counted from 0; -1 before the first."""
        self.was_spike = torch.zeros((), dtype=torch.bool, device=device)
        """Whether that update was skipped because of its loss alone."""
        self.losses = torch.zeros(0, device=device)
        """This process's losses in that update, (N,); not saved in checkpoints."""

    def judge(self, step: int, norm: Tensor, losses: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """1 if the update must be skipped, else 0, as an fp32 scalar.

        norm: of the full gradient. losses: (N,) of this process; ``mean`` averages them over all processes. A loss that
        is not finite must have made the gradient not finite.
        """
        skip = ~norm.isfinite()
        if self.factor:
            loss = mean(losses)
            skip = skip | ((self._seen >= WARM) & (loss > self.factor * self._mean / (1 - RATE**self._seen)))
            self._mean = torch.where(skip, self._mean, self._mean.lerp(loss, 1 - RATE))
            self._seen = torch.where(skip, self._seen, self._seen + 1)
        if self.losses.shape != losses.shape:
            self.losses = torch.zeros_like(losses)
        self.losses = torch.where(skip, losses, self.losses)
        self.step = torch.where(skip, step, self.step)
        self.was_spike = torch.where(skip, norm.isfinite(), self.was_spike)
        self.in_a_row = torch.where(skip, self.in_a_row + 1, 0)
        return skip.float()

    def state(self) -> Tensor:
        """The state to save in a checkpoint, (4,) float64."""
        return torch.stack([v.double() for v in (self.in_a_row, self._mean, self._seen, self.step)])

    def load_state(self, state: Tensor) -> None:
        """The inverse of state."""
        *counts, step = state.to(self.step.device).unbind()
        self.in_a_row, self._mean, self._seen = (count.float() for count in counts)
        self.step = step.long()
