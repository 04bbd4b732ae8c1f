"""How training draws timesteps, and the importance weights that keep the loss's expectation unchanged.

Everything stays on the sampler's device and has fixed shapes, so that nothing here needs a host sync.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from numpy.typing import ArrayLike
from torch import Tensor

DRAW_SCALE = 2**30
"""Probabilities are quantised to integers at this scale: a total below 2^31 times a 32-bit word fits in int64."""


class TimestepSampler(Protocol):
    """Draws timesteps by weight and learns from the losses."""

    learns: bool
    num_timesteps: int

    def weights(self) -> Tensor:
        """Unnormalised weights, (num_timesteps,) float64 on the sampler's device, none negative."""
        ...

    def update(self, timesteps: Tensor | ArrayLike, losses: Tensor | ArrayLike) -> None:
        """Learn from per-sample losses (N,) at timesteps (N,)."""
        ...


def draw(sampler: TimestepSampler, words: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps (N,) int64 drawn by the sampler's weights, and the importance weight of each one's loss, (N,) float32.

    ``words`` are int64 (N, 2) on the sampler's device, two random 32-bit words a sample (``kernels.philox_uint32``).

    The probabilities are quantised to integers c[t] = ceil(2^30 p[t]). Their cumulative sum is exact and therefore the
    same on every device and at every repetition, which a sum of floats on a GPU is not, and no timestep of positive
    weight is lost. The words, as one 64-bit fraction of the total C = sum(c) <= 2^30 + T, select the timestep. Each is
    drawn with probability c[t] / C to within 2^-33 of it, and its importance weight is C / (T c[t]): exact for the
    quantised probabilities, however coarse.
    """
    weights = sampler.weights()
    shares = (weights / weights.sum() * DRAW_SCALE).ceil().long()
    ends = shares.cumsum(0)
    total = ends[-1]
    high, low = words.unbind(1)
    place = (high * total + (low * total >> 32)) >> 32  # floor(total * words / 2^64)
    timesteps = torch.searchsorted(ends, place, right=True)
    return timesteps, (total.double() / (len(shares) * shares[timesteps])).float()


class UniformSampler:
    """Draws every timestep with the same probability."""

    learns = False

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = int(num_timesteps)
        self._weights = torch.ones(self.num_timesteps, dtype=torch.float64, device=device)

    def weights(self) -> Tensor:
        """Ones, (num_timesteps,) float64."""
        return self._weights

    def update(self, timesteps: Tensor | ArrayLike, losses: Tensor | ArrayLike) -> None:
        """Do nothing: uniform weights do not depend on the losses."""


class LossSecondMomentSampler:
    """Draws timesteps in proportion to sqrt(E[L_t^2]) over their last losses (Nichol & Dhariwal 2021, equation 18).

    Uniform until every timestep has ``history_per_term`` losses; after that a fraction ``uniform_prob`` stays uniform.
    The same losses in the same order give the same bits on every process.
    """

    learns = True

    def __init__(
        self,
        num_timesteps: int,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_timesteps = int(num_timesteps)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        # oldest first, zeros after the last
        self.history = torch.zeros(self.num_timesteps, history_per_term, dtype=torch.float64, device=device)
        self.counts = torch.zeros(self.num_timesteps, dtype=torch.int64, device=device)

    def weights(self) -> Tensor:
        """Weights that sum to 1 once all histories are full, ones before; (num_timesteps,) float64."""
        roots = self.history.square().mean(-1).sqrt()
        total = roots.sum()
        p = roots / total * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        warm = (self.counts == self.history_per_term).all() & (total > 0)
        return torch.where(warm, p, 1.0)

    def update(self, timesteps: Tensor | ArrayLike, losses: Tensor | ArrayLike) -> None:
        """Add per-sample losses (N,) at timesteps (N,), in order; a full history drops its oldest loss.

        Losses that are not finite are ignored, because they belong to an update that is skipped. ValueError if
        timesteps and losses differ in length.
        """
        device, size = self.history.device, self.history_per_term
        rows = torch.as_tensor(timesteps, dtype=torch.int64, device=device)
        values = torch.as_tensor(losses, dtype=torch.float64, device=device)
        if rows.shape != values.shape:
            raise ValueError(f"timesteps have shape {tuple(rows.shape)}, but losses {tuple(values.shape)}")
        if not len(rows):
            return
        # Sorted by timestep, each timestep's new losses are adjacent and in order; the ignored ones come last.
        rows, order = torch.where(values.isfinite(), rows, self.num_timesteps).sort(stable=True)
        values = values[order]
        ends = torch.searchsorted(rows, torch.arange(self.num_timesteps + 1, device=device))
        first, lengths = ends[:-1, None], self.counts[:, None]  # (T, 1)
        totals = lengths + ends.diff()[:, None]
        # Keep the last ``size`` of each timestep's old losses followed by its new ones.
        places = torch.arange(size, device=device) + (totals - size).clamp(min=0)  # (T, H)
        old = self.history.gather(1, places.clamp(max=size - 1))
        new = values[(first + places - lengths).clamp(0, len(values) - 1)]
        self.history = torch.where(places < lengths, old, torch.where(places < totals, new, 0.0))
        self.counts = totals.squeeze(1).clamp(max=size)

    def state_dict(self) -> dict[str, Tensor]:
        """State for a checkpoint: history (T, H) float64 and counts (T,) int64. Later updates do not modify them."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict; ValueError if the number of timesteps differs."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the loss history has {state['history'].shape[0]} timesteps, but the process has {self.num_timesteps}"
            )
        self.history = torch.empty_like(self.history).copy_(state["history"])
        self.counts = torch.empty_like(self.counts).copy_(state["counts"])
