"""Noise schedules: beta_t for t = 0..T-1, in float64."""

import itertools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import NoiseSchedule

Float64Array = NDArray[np.float64]


def linear_betas(num_timesteps: int) -> Float64Array:
    """Betas from 1e-4 to 0.02 at 1000 steps (Ho et al. 2020, section 4), scaled so that other lengths end alike.

    Shape (num_timesteps,). ValueError where a beta would reach 1, which is so below 21 steps.
    """
    scale = 1000 / num_timesteps
    if scale * 0.02 >= 1:
        raise ValueError(
            f"diffusion_steps {num_timesteps} is too short for a linear schedule (a beta would be 1): use at least 21"
        )
    return np.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=np.float64)


def cosine_betas(num_timesteps: int) -> Float64Array:
    """Betas whose alphas_cumprod follow a squared cosine (Nichol & Dhariwal 2021, equation 17). (num_timesteps,)"""
    return betas_for_alpha_bar(num_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)


def betas_for_alpha_bar(
    num_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> Float64Array:
    """Betas that make alphas_cumprod follow ``alpha_bar``, a function of t / T in [0, 1]; each at most ``max_beta``."""
    times = [i / num_timesteps for i in range(num_timesteps + 1)]
    return np.array([min(1 - alpha_bar(end) / alpha_bar(start), max_beta) for start, end in itertools.pairwise(times)])


def get_named_beta_schedule(name: str, num_timesteps: int) -> Float64Array:
    """The schedule called ``name``: linear or cosine. (num_timesteps,)"""
    return {NoiseSchedule.LINEAR: linear_betas, NoiseSchedule.COSINE: cosine_betas}[NoiseSchedule(name)](num_timesteps)
