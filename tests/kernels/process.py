"""What the tests of diffusion_step and diffusion_loss share: a process, a batch at mixed timesteps, and layouts."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion import GaussianDiffusion, ModelMeanType, get_named_beta_schedule

from .support import DEVICE, random

STEPS = 50


@cache
def process() -> GaussianDiffusion:
    weights = np.linspace(0.5, 2, STEPS)
    return GaussianDiffusion(betas=get_named_beta_schedule("linear", STEPS), loss_weight=weights)


def tables(dtype: torch.dtype = torch.float32) -> Tensor:
    return process().step_tables(DEVICE, dtype)


def timesteps(n: int, first: int = 0) -> Tensor:
    """Mixed in the batch: the ends of the process and what lies between."""
    every = [0, STEPS - 1, 7, 1, 30]
    return torch.tensor([every[(first + i) % len(every)] for i in range(n)], device=DEVICE)


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _sliced(x: Tensor) -> Tensor:
    """Every second element of a larger tensor's channels, pixels at an offset."""
    n, c, h, w = x.shape
    whole = torch.full((n, 2 * c, h + 1, w), torch.nan, dtype=x.dtype)
    whole[:, ::2, 1:] = x
    return whole.to(DEVICE)[:, ::2, 1:]


def _transposed(x: Tensor) -> Tensor:
    """Dense, but height and width do not flatten to one stride."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "sliced": _sliced,
    "transposed": _transposed,
}


def images(*shape: int, seed: int) -> Tensor:
    """8-bit pixels in [-1, 1], black and white ones among them."""
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    levels[..., 0], levels[..., -1:] = 0, 255
    return (levels / 127.5 - 1).to(DEVICE)


def model_output(mean_type: str, x_start: Tensor, noise: Tensor, learned: bool, seed: int) -> Tensor:
    """(N, C or 2C, H, W): near what a trained model says, with values for the variance."""
    n, c, h, w = x_start.shape
    output = random(n, c * (2 if learned else 1), h, w, seed=seed).to(DEVICE)
    of_noise = mean_type in (ModelMeanType.EPSILON, ModelMeanType.V, ModelMeanType.FLOW)
    target = noise - (x_start if mean_type == ModelMeanType.FLOW else 0) if of_noise else x_start
    output[:, :c] = target + 0.1 * output[:, :c]
    return output
