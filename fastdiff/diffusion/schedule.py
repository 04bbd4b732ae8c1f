"""Noise schedules, timestep respacing, and the tables that follow from the betas."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import NoiseSchedule
from fastdiff.kernels.gaussian import TABLES

Float64Array = NDArray[np.float64]
DDIM_PREFIX = "ddim"


def linear_betas(num_timesteps: int) -> Float64Array:
    """Betas from 1e-4 to 0.02 at 1000 steps (Ho et al. 2020, section 4), scaled by 1000 / num_timesteps at others.

    Shape (num_timesteps,). ValueError if a beta would reach 1, which happens below 21 steps.
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


def space_timesteps(num_timesteps: int, spec: str | Sequence[int]) -> set[int]:
    """The timesteps to keep out of ``num_timesteps`` (Nichol & Dhariwal 2021, section 4).

    ``spec`` is a count ("250"), counts for sections of equal length ("10,15,20", or a sequence of them), or "ddimN":
    N steps at a fixed integer stride, as in the DDIM paper. Each section's first and last step are kept.

    ValueError if the spec is none of these, asks for more steps than the process has, or fits no integer stride.
    """
    if isinstance(spec, str) and spec.startswith(DDIM_PREFIX):
        return _strided(num_timesteps, _count(spec.removeprefix(DDIM_PREFIX), spec), spec)
    counts = [_count(part, spec) for part in (spec.split(",") if isinstance(spec, str) else spec)]
    if not any(counts):
        raise ValueError(f"timestep_respacing {spec!r} keeps no timestep")
    length, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = length + (section < longer)
        if count > size:
            raise ValueError(f"timestep_respacing {spec!r} asks for {count} of {size} timesteps")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Accumulate the stride like the original: multiplying rounds some halves the other way and keeps other steps.
        kept.update(
            start + round(place)
            for place in itertools.accumulate(itertools.repeat(stride, count - 1), initial=0.0)
            if count
        )
        start += size
    return kept


def _strided(num_timesteps: int, count: int, spec: str) -> set[int]:
    for stride in range(1, num_timesteps + 1):
        kept = range(0, num_timesteps, stride)
        if len(kept) == count:
            return set(kept)
    raise ValueError(f"timestep_respacing {spec!r}: no integer stride gives {count} of {num_timesteps} timesteps")


def _count(part: str | int, spec: str | Sequence[int]) -> int:
    try:
        count = int(part)
    except (TypeError, ValueError):
        count = -1
    if count < 0:
        raise ValueError(
            f"timestep_respacing {spec!r} is not a count (250), counts per section (10,15,20) or ddimN (ddim50)"
        )
    return count


class Tables:
    """The tables of a process over ``betas`` (T,): float64 arrays (T,), and their copies on devices as tensors."""

    def __init__(self, betas: Float64Array) -> None:
        self._on_devices: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.betas = betas
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.one_minus_alphas_cumprod_prev = 1 - self.alphas_cumprod_prev
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        # q(x_t | x_0) and its inverses
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_0), DDPM equation 7
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)
        # The posterior variance is 0 at t = 0, so its log would be -inf there: use the value at t = 1 instead, or beta
        # if the process has a single step.
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        self.fixed_large_variance = np.append(first, betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)

    def cached(self, name: str, device: torch.device, dtype: torch.dtype, values: Callable[[], NDArray[Any]]) -> Tensor:
        """The table ``name``, computed by ``values``, in ``dtype`` but at least fp32; cached on each device."""
        key = (name, device, torch.promote_types(dtype, torch.float32))
        if key not in self._on_devices:
            self._on_devices[key] = torch.tensor(values(), dtype=key[2], device=device)
        return self._on_devices[key]

    def table(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table ``name`` at t as (N, 1, ...), in like's dtype but at least fp32."""
        values = self.cached(name, like.device, like.dtype, lambda: getattr(self, name))
        return values[t].view(-1, *[1] * (like.ndim - 1))

    def step_tables(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tables of diffusion_step and diffusion_loss, (T, len(TABLES)), in ``dtype`` but at least fp32."""
        return self.cached(
            "step_tables", device, dtype, lambda: np.stack([getattr(self, name) for name in TABLES], axis=1)
        )
