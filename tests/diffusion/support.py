"""What the process tests share: processes, and the exact model of Gaussian data."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion, get_named_beta_schedule


def process(steps: int = 50, schedule: str = "linear", **kwargs: Any) -> GaussianDiffusion:
    """A process in which timesteps reach the model as they are."""
    return GaussianDiffusion(betas=get_named_beta_schedule(schedule, steps), **kwargs)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gather(table: Any, t: Tensor) -> Tensor:
    """A table's values at t as (N, 1, 1, 1), written apart from GaussianDiffusion.table."""
    return torch.as_tensor(table)[t][:, None, None, None]


def constant(output: Tensor) -> Callable[..., Tensor]:
    """A model that returns ``output`` whatever it is given."""
    return lambda *_, **__: output


def gaussian_eps(diffusion: GaussianDiffusion, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[noise | x_t] for data N(mean, std^2): what a perfect model predicts. Sees x and the timesteps, as models do."""
    alpha_bar = torch.as_tensor(diffusion.alphas_cumprod)
    place = {float(step): i for i, step in enumerate(diffusion.timestep_map)}

    def model(x: Tensor, timesteps: Tensor) -> Tensor:
        a = alpha_bar[[place[float(step)] for step in timesteps]].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model
