"""How training draws timesteps, and with what weight each loss counts so that its expectation stays.

Everything stays on the sampler's device and has fixed shapes, so that nothing here waits for it.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from numpy.typing import ArrayLike
from torch import Tensor

DRAW_SCALE = 2**30
"""The whole number that the probabilities are cut to: with a total below 2^31 its product with a word fits in int64."""


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

    The probabilities are cut to whole numbers c[t] = ceil(2^30 p[t]): their cumulative sum is exact, so that it is
    the same wherever and however often it is taken, which of floats on a GPU it is not; and no timestep of positive
    weight is lost. The words as one 64-bit fraction of the total C = sum(c) <= 2^30 + T name the timestep. Each is
    drawn with probability c[t] / C to within 2^-33 of it, and its importance weight is C / (T c[t]): exact for the
    probabilities that were used, however coarse.
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
    """Every timestep alike."""

    learns = False

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        self.num_timesteps = int(num_timesteps)
        self._weights = torch.ones(self.num_timesteps, dtype=torch.float64, device=device)

    def weights(self) -> Tensor:
        """Ones, (num_timesteps,) float64."""
        return self._weights

    def update(self, timesteps: Tensor | ArrayLike, losses: Tensor | ArrayLike) -> None:
        """Nothing to learn."""


class LossSecondMomentSampler:
    """Timesteps in proportion to sqrt(E[L_t^2]) over the last losses of each (Nichol & Dhariwal 2021, equation 18).

    Uniform until every timestep has ``history_per_term`` losses; a share ``uniform_prob`` stays uniform for good.
    The same losses in the same order leave the same bits on every process.
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
        # oldest first, zeros behind the last
        self.history = torch.zeros(self.num_timesteps, history_per_term, dtype=torch.float64, device=device)
        self.counts = torch.zeros(self.num_timesteps, dtype=torch.int64, device=device)

    def weights(self) -> Tensor:
        """Weights that sum to 1 once warm, ones before; (num_timesteps,) float64."""
        roots = self.history.square().mean(-1).sqrt()
        total = roots.sum()
        p = roots / total * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps
        warm = (self.counts == self.history_per_term).all() & (total > 0)
        return torch.where(warm, p, 1.0)

    def update(self, timesteps: Tensor | ArrayLike, losses: Tensor | ArrayLike) -> None:
        """Add per-sample losses (N,) at timesteps (N,), in order; the oldest of a full history drops out.

        A loss that is not finite belongs to an update that is skipped, and is not remembered either. ValueError where
        timesteps and losses are not of one length.
        """
        device, size = self.history.device, self.history_per_term
        rows = torch.as_tensor(timesteps, dtype=torch.int64, device=device)
        values = torch.as_tensor(losses, dtype=torch.float64, device=device)
        if rows.shape != values.shape:
            raise ValueError(f"{tuple(rows.shape)} timesteps do not go with {tuple(values.shape)} losses")
        if not len(rows):
            return
        # Sorted by timestep, each one's new losses lie together and in order; the ignored ones lie behind all others.
        rows, order = torch.where(values.isfinite(), rows, self.num_timesteps).sort(stable=True)
        values = values[order]
        ends = torch.searchsorted(rows, torch.arange(self.num_timesteps + 1, device=device))
        first, lengths = ends[:-1, None], self.counts[:, None]  # (T, 1)
        totals = lengths + ends.diff()[:, None]
        # What is kept are the last places of the old losses followed by the new ones.
        places = torch.arange(size, device=device) + (totals - size).clamp(min=0)  # (T, H)
        old = self.history.gather(1, places.clamp(max=size - 1))
        new = values[(first + places - lengths).clamp(0, len(values) - 1)]
        self.history = torch.where(places < lengths, old, torch.where(places < totals, new, 0.0))
        self.counts = totals.squeeze(1).clamp(max=size)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: history (T, H) float64 and counts (T,) int64, which later updates leave alone."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict; ValueError if it is of another process length."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the loss history holds {state['history'].shape[0]} timesteps, the process has {self.num_timesteps}"
            )
        self.history = torch.empty_like(self.history).copy_(state["history"])
        self.counts = torch.empty_like(self.counts).copy_(state["counts"])
