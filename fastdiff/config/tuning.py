"""The settings of the search for a time grid."""

from dataclasses import dataclass

from fastdiff.config.base import Config, option
from fastdiff.config.choices import Sampler


@dataclass(frozen=True)
class TuneConfig(Config):
    """How the time grid of a checkpoint is searched for."""

    panel = "Tuning"

    steps: int = option(8, "Number of timesteps of the grid.")
    sampler: Sampler = option(
        Sampler.UNIPC, "The sampler that will use it: ddim, dpm++, dpm++3m, unipc, ipndm or heun."
    )
    num_samples: int = option(32, "Images that are drawn with each grid and compared with their exact solutions.")
    batch_size: int = option(32, "Images per batch.")
    trials: int = option(150, "Most grids to try; the search ends before if no neighbour of the best one is better.")
    reference_steps: int = option(100, "Steps of the solutions that count as exact, by UniPC on the quadratic grid.")
    clip_denoised: bool = option(True, "Clip the predicted x_0 to [-1, 1] in every step.")
    seed: int = option(0, "Seed of the noise that the images start from.")

    def check(self) -> None:
        for name in ("steps", "num_samples", "batch_size", "trials"):
            self.require(getattr(self, name) > 0, name, "positive")
        self.require(self.steps > 1, "steps", "at least 2")
        self.require(self.reference_steps > self.steps, "reference_steps", f"above steps, which is {self.steps}")
        self.require(self.num_samples <= 10_000, "num_samples", "at most 10,000")
        self.require(0 <= self.seed < 2**64, "seed", "at least 0 and below 2^64")
        if self.sampler.stochastic:
            raise ValueError(f"sampler {self.sampler} adds noise, so that no exact solution exists: name another one")
