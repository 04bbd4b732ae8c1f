"""Noise schedules, timestep respacing, and the tables that follow from the betas."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import DiffusionConfig, NoiseSchedule, Prediction, Weighting
from fastdiff.kernels.gaussian import TABLES, ModelMeanType

Float64Array = NDArray[np.float64]
DDIM_PREFIX = "ddim"
NO_SIGNAL = 1e-20
"""Takes the place of an alphas_cumprod of 0 where a table divides by it: every such quotient stays finite in fp32."""


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
    return _cosine_betas(num_timesteps).copy()


@functools.cache
def _cosine_betas(num_timesteps: int) -> Float64Array:
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


def flow_betas(num_timesteps: int) -> Float64Array:
    """Betas of a rectified flow: x_t is the unit-variance multiple of (1 - s) x_0 + s epsilon at s = (t + 1) / T.

    Liu et al. 2023, Lipman et al. 2023. Every Gaussian path is a variance-preserving process up to a factor of x_t:
    alphas_cumprod = (1 - s)^2 / ((1 - s)^2 + s^2). The last beta is 1. Shape (num_timesteps,).
    """
    s = np.arange(1, num_timesteps + 1) / num_timesteps
    return _betas((1 - s) ** 2 / ((1 - s) ** 2 + s**2))


def shifted(betas: Float64Array, shift: float) -> Float64Array:
    """Betas whose sigma / alpha is ``shift`` times that of ``betas`` at every timestep, for larger images.

    Averaged over its neighbours, a pixel of an image d times as large has d times less noise: shift by d to have as
    much (Hoogeboom et al. 2023, simple diffusion, equation 4; for a flow Esser et al. 2024, equation 23).
    """
    kept = np.cumprod(1 - betas)
    return _betas(kept / (kept + shift**2 * (1 - kept)))


def zero_terminal(betas: Float64Array) -> Float64Array:
    """Betas with sqrt(alphas_cumprod) scaled and shifted so that the first one stays and the last is 0.

    Lin et al. 2024 (Common Diffusion Noise Schedules and Sample Steps are Flawed), algorithm 1: x_T is pure noise in
    training, as it is in sampling. ValueError if the process has a single timestep.
    """
    if len(betas) < 2:
        raise ValueError("zero_terminal_snr needs at least two timesteps")
    signal = np.sqrt(np.cumprod(1 - betas))
    return _betas(((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2)


def _betas(alphas_cumprod: Float64Array) -> Float64Array:
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def betas_of(config: DiffusionConfig) -> Float64Array:
    """The betas (diffusion_steps,) of the process that the configuration describes, before any respacing."""
    if config.prediction is Prediction.FLOW:
        betas = flow_betas(config.diffusion_steps)
    else:
        betas = get_named_beta_schedule(config.noise_schedule, config.diffusion_steps)
    if config.noise_shift != 1:
        betas = shifted(betas, config.noise_shift)
    return zero_terminal(betas) if config.zero_terminal_snr else betas


def loss_weights(betas: Float64Array, mean_type: ModelMeanType, config: DiffusionConfig) -> Float64Array:
    """The weight (T,) of the mean squared error of the model's prediction at every timestep of the process.

    With lambda the log of the signal-to-noise ratio, min-snr weights the squared error of x_0 by min(e^lambda, gamma)
    (Hang et al. 2023, equation 8), and sigmoid that of epsilon by -dlambda / ds sigmoid(bias - lambda), s in [0, 1]
    (Hoogeboom et al. 2024, Kingma & Gao 2023). Both convert it to the error of what the model predicts.
    """
    if config.weighting is Weighting.NONE:
        return np.ones_like(betas)
    kept = np.maximum(np.cumprod(1 - betas), NO_SIGNAL)
    alpha, sigma = np.sqrt(kept), np.sqrt(1 - kept)
    # the squared error of x_0 for one of the prediction
    of_xstart = {
        ModelMeanType.EPSILON: sigma / alpha,
        ModelMeanType.START_X: np.ones_like(betas),
        ModelMeanType.V: sigma,
        ModelMeanType.FLOW: sigma / (alpha + sigma),
    }[mean_type] ** 2
    snr = kept / (1 - kept)
    if config.weighting is Weighting.MIN_SNR:
        return np.minimum(snr, config.min_snr_gamma) * of_xstart
    log_snr = np.log(snr)
    falls = -np.gradient(log_snr) * len(betas)
    if betas[-1] == 1:  # the log of no signal is minus infinity: the slope of the SNR itself, over the SNR
        falls[-2] = (snr[-3] - snr[-1]) / (2 * snr[-2]) * len(betas)
    return snr * falls / (1 + np.exp(log_snr - config.sigmoid_bias)) * of_xstart


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
        signal = np.where(self.alphas_cumprod > 0, self.alphas_cumprod, NO_SIGNAL)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / signal)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / signal - 1)
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
