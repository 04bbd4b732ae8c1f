"""How training draws timesteps, and with what weight each loss counts so that its expectation stays."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TimestepSampler(Protocol):
    """Draws timesteps by weight and learns from the losses."""

    num_timesteps: int

    def weights(self) -> NDArray[np.float64]:
        """Unnormalised weights, (num_timesteps,), all positive."""
        ...

    def update(self, timesteps: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Learn from per-sample losses (N,) at timesteps (N,)."""
        ...


def draw(
    sampler: TimestepSampler, batch_size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Timesteps (batch_size,) drawn by the sampler's weights, and the importance weight of each one's loss."""
    weights = sampler.weights()
    p = weights / weights.sum()
    timesteps = rng.choice(len(p), size=batch_size, p=p)
    return timesteps, (1 / (len(p) * p[timesteps])).astype(np.float32)


class UniformSampler:
    """Every timestep alike."""

    learns = False

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def weights(self) -> NDArray[np.float64]:
        """Ones, (num_timesteps,)."""
        return np.ones(self.num_timesteps)

    def update(self, timesteps: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Nothing to learn."""


class LossSecondMomentSampler:
    """Timesteps in proportion to sqrt(E[L_t^2]) over the last losses of each (Nichol & Dhariwal 2021, equation 18).

    Uniform until every timestep has ``history_per_term`` losses; a share ``uniform_prob`` stays uniform for good.
    """

    learns = True

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.num_timesteps = num_timesteps
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self.history = np.zeros((num_timesteps, history_per_term))  # oldest first
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def weights(self) -> NDArray[np.float64]:
        """Weights that sum to 1 once warm, ones before; (num_timesteps,)."""
        if not (self.counts == self.history_per_term).all():
            return np.ones(self.num_timesteps)
        p = np.sqrt((self.history**2).mean(axis=-1))
        p /= p.sum()
        return p * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update(self, timesteps: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Add per-sample losses (N,) at timesteps (N,), in order; the oldest of a full history drops out."""
        for t, loss in zip(timesteps, losses, strict=True):
            if not np.isfinite(loss):
                continue  # the update is skipped, and must not be remembered either
            if self.counts[t] == self.history_per_term:
                self.history[t, :-1] = self.history[t, 1:]
                self.history[t, -1] = loss
            else:
                self.history[t, self.counts[t]] = loss
                self.counts[t] += 1

    def state_dict(self) -> dict[str, NDArray[np.generic]]:
        """What a checkpoint keeps."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: dict[str, NDArray[np.generic]]) -> None:
        """The inverse of state_dict; ValueError if it is of another process length."""
        if state["history"].shape != self.history.shape:
            raise ValueError(
                f"the loss history holds {state['history'].shape[0]} timesteps, the process has {self.num_timesteps}"
            )
        self.history = np.array(state["history"], dtype=np.float64)
        self.counts = np.array(state["counts"], dtype=np.int64)
