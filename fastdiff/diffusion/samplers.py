"""Sampling loops and the second-order samplers for few steps: DPM-Solver++(2M), its SDE variant, and Heun's method.

They are independent of the process: a second-order step takes a predictor of x_0 and the step's coefficients at every
t. Here alpha_t = sqrt(alphas_cumprod), sigma_t = sqrt(1 - alphas_cumprod) and lambda_t = log(alpha_t / sigma_t). At
t = 0 each sampler returns the prediction itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.noise import Philox, draws_of
from fastdiff.diffusion.schedule import Float64Array
from fastdiff.kernels import Backend

PredictXstart = Callable[[Tensor, Tensor], Tensor]
"""The x_0 (N, C, ...) predicted from x_t (N, C, ...) and t (N,)."""


def progressive(
    step: Callable[..., dict[str, Tensor]],
    model: Callable[..., Tensor],
    shape: Sequence[int],
    num_timesteps: int,
    backend: Backend,
    noise: Tensor | Philox | None = None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Iterator[dict[str, Tensor]]:
    """Yield the dict of each ``step(model, x, t, noise=..., **kwargs)`` from x_T on; its sample is the next step's x.

    ``backend`` generates a Philox ``noise``; other keywords are those of GaussianDiffusion.p_sample_loop_progressive.
    """
    if isinstance(noise, Philox):
        noise = noise.of_start(shape, backend)
    if device is None:
        device = noise.device if noise is not None else _device_of(model)
    x = torch.randn(*shape, device=device) if noise is None else noise
    if x.shape != tuple(shape):
        raise ValueError(f"noise must have shape {tuple(shape)}, not {tuple(x.shape)}")
    # the same Philox serves every step
    draws = repeat(step_noise) if isinstance(step_noise, Philox) else draws_of(step_noise)
    # every t is on the device before the first step, so that no step waits for a copy
    timesteps = torch.arange(num_timesteps, device=device).flip(0)[:, None].expand(-1, shape[0])
    for t, draw in zip(timesteps, draws):  # noqa: B905  # there may be more noise than steps
        with torch.no_grad():
            out = step(model, x, t, noise=draw, **kwargs)
        yield out
        x = out["sample"]


def last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    """The last step's sample."""
    out: dict[str, Tensor] = {}
    for out in steps:  # noqa: B007  # only the last one counts
        pass
    return out["sample"]


def dpm_solver_coefficients(alpha: Float64Array, sigma: Float64Array, sde: bool) -> Float64Array:
    """(T, 4): coefficients in x_{t-1} of x_t, of x_0, of the change of x_0 since the previous step, and of the noise.

    With h = lambda_{t-1} - lambda_t and k = 1, or 2 for the SDE, these are, from Lu et al. 2022,
    sigma_{t-1} / sigma_t exp(-(k - 1) h), b = alpha_{t-1} (1 - exp(-k h)), b / 2r with r = h_{t+1} / h_t, and
    sigma_{t-1} sqrt(1 - exp(-2 h)) or 0. At t = 0, where h is infinite, these are 0, 1, 0, 0.

    r is clamped to at least 1. Steps that are even in t grow in lambda towards t = 0, the last ones to several times
    the previous one, and extrapolating the change of x_0 that far overshoots. r tends to 1 as the number of steps
    grows, so the clamp does not change the order.
    """
    alpha_prev, sigma_prev = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
    decay = alpha * sigma_prev / (sigma * alpha_prev)  # exp(-h)
    x = sigma_prev / sigma * (decay if sde else 1.0)
    x_start = alpha_prev * (1 - decay ** (2 if sde else 1))
    change = np.zeros_like(x)
    steps = -np.diff(np.log(alpha / sigma))  # h_t for t = 1, ..., T-1
    change[1:-1] = x_start[1:-1] / 2 * np.minimum(steps[:-1] / steps[1:], 1.0)
    noise = sigma_prev * np.sqrt(1 - decay**2) if sde else np.zeros_like(x)
    return np.stack([x, x_start, change, noise], axis=1)


def dpm_solver_step(
    predict: PredictXstart,
    table: Tensor,
    x: Tensor,
    t: Tensor,
    previous: Tensor | None,
    noise: Callable[[], Tensor] | None,
) -> dict[str, Tensor]:
    """One step to x_{t-1} (Lu et al. 2022, algorithm 2, or SDE-DPM-Solver++(2M)): a dict with sample and pred_xstart.

    ``table`` holds dpm_solver_coefficients, ``noise`` is the SDE's. ``previous`` is the previous step's pred_xstart;
    without it the step is first order: DDIM, with eta 1 for the SDE.
    """
    x_start = predict(x, t)
    of_x, of_x_start, of_change, of_noise = _columns(table, t, x.ndim)
    sample = of_x * x + of_x_start * x_start
    if previous is not None:
        sample = sample + of_change * (x_start - previous)
    if noise is not None:
        sample = sample + of_noise * noise()  # drawn after the model call, whose memory is free again
    return {"sample": sample, "pred_xstart": x_start}


def heun_coefficients(alpha: Float64Array, sigma: Float64Array) -> Float64Array:
    """(T, 3): alpha_t, sigma_t and the angle arctan(sigma_t / alpha_t)."""
    return np.stack([alpha, sigma, np.arctan2(sigma, alpha)], axis=1)


def heun_step(predict: PredictXstart, table: Tensor, x: Tensor, t: Tensor, last: bool) -> dict[str, Tensor]:
    """One step to x_{t-1} (Karras et al. 2022, algorithm 1): a dict with sample and pred_xstart, that of x_t.

    ``table`` holds heun_coefficients. The step integrates over the angle: with the paper's s = cos and sigma = tan of
    the angle, x = cos x_0 + sin eps, and its ODE is dx / dangle = (alpha x - x_0) / sigma, bounded at both ends.
    Integration over sigma / alpha, which is in the thousands at the end of a cosine schedule, would make the first of
    few steps very inaccurate. With ``last`` (t = 0) the step returns x_0.
    """
    x_start = predict(x, t)
    if last:
        return {"sample": x_start, "pred_xstart": x_start}
    alpha, sigma, angle = _columns(table, t, x.ndim)
    alpha_prev, sigma_prev, angle_prev = _columns(table, t - 1, x.ndim)
    slope = (alpha * x - x_start) / sigma
    euler = x + (angle_prev - angle) * slope
    slope_prev = (alpha_prev * euler - predict(euler, t - 1)) / sigma_prev
    return {"sample": x + (angle_prev - angle) * (slope + slope_prev) / 2, "pred_xstart": x_start}


def _columns(table: Tensor, t: Tensor, ndim: int) -> list[Tensor]:
    """The table's columns at t, each as (N, 1, ...) of ``ndim`` dimensions."""
    return [column.view(-1, *[1] * (ndim - 1)) for column in table[t].unbind(1)]


def _device_of(model: Callable[..., Tensor]) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(parameters(), None) if callable(parameters) else None
    return first.device if first is not None else torch.device("cpu")
