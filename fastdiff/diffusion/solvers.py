"""Second-order samplers for few steps: DPM-Solver++(2M), its SDE variant, and Heun's method.

alpha_t = sqrt(alphas_cumprod), sigma_t = sqrt(1 - alphas_cumprod), lambda_t = log(alpha_t / sigma_t). Each goes by the
model's prediction of x_0 and ends, at t = 0, with that prediction itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.loops import begin
from fastdiff.diffusion.noise import Philox
from fastdiff.diffusion.schedule import Float64Array

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion


def dpm_solver_coefficients(diffusion: "GaussianDiffusion", sde: bool) -> Float64Array:
    """(T, 4): what x_t, x_0, its change since the step before and the noise contribute to x_{t-1}.

    With h = lambda_{t-1} - lambda_t and k = 1, or 2 for the SDE, these are, of Lu et al. 2022,
    sigma_{t-1} / sigma_t exp(-(k - 1) h), b = alpha_{t-1} (1 - exp(-k h)), b / 2r with r = h_{t+1} / h_t, and
    sigma_{t-1} sqrt(1 - exp(-2 h)) or 0. At t = 0, where h is infinite, these are 0, 1, 0, 0.

    r is held to 1 or more: even steps in t grow in lambda towards t = 0, the last ones to several times the one before,
    and to go on as far along the change of x_0 overshoots. r tends to 1 with ever more steps, so that the order stays.
    """
    alpha, sigma = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
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
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    previous: Tensor | None = None,
    *,
    sde: bool = False,
    noise: Tensor | Philox | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """One step to x_{t-1} (Lu et al. 2022, algorithm 2, or SDE-DPM-Solver++(2M)): a dict with sample and pred_xstart.

    ``previous`` is pred_xstart of the step before, without which the step is of first order: DDIM, with eta 1 for the
    SDE. The SDE's ``noise`` is drawn afresh unless it is given. Other keywords as GaussianDiffusion.p_mean_variance.
    """
    x_start = diffusion.p_mean_variance(model, x, t, **kwargs)["pred_xstart"]
    table = diffusion.on_device(
        "sde-dpm-solver++" if sde else "dpm-solver++",
        x.device,
        x.dtype,
        lambda: dpm_solver_coefficients(diffusion, sde),
    )
    of_x, of_x_start, of_change, of_noise = _columns(table, t, x.ndim)
    sample = of_x * x + of_x_start * x_start
    if previous is not None:
        sample = sample + of_change * (x_start - previous)
    if sde:
        if isinstance(noise, Philox):
            noise = noise.of_update(diffusion.num_timesteps - t, x.shape)
        sample = sample + of_noise * (torch.randn_like(x) if noise is None else noise)
    return {"sample": sample, "pred_xstart": x_start}


def dpm_solver_loop(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    shape: Sequence[int],
    sde: bool,
    noise: Tensor | Philox | None = None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    pred_xstart: bool = True,
    **kwargs: Any,
) -> Iterator[dict[str, Tensor]]:
    """Every step's dict, see GaussianDiffusion.dpm_solver_sample_loop_progressive."""
    x, steps = begin(diffusion, model, shape, noise, step_noise, device)
    previous = None
    for t, draw in steps:
        with torch.no_grad():
            out = dpm_solver_step(diffusion, model, x, t, previous, sde=sde, noise=draw, **kwargs)
        x, previous = out["sample"], out["pred_xstart"]
        yield out if pred_xstart else {"sample": x}


def heun_coefficients(diffusion: "GaussianDiffusion") -> Float64Array:
    """(T, 3): alpha_t, sigma_t and the angle arctan(sigma_t / alpha_t)."""
    alpha, sigma = diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod
    return np.stack([alpha, sigma, np.arctan2(sigma, alpha)], axis=1)


def heun_step(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    *,
    last: bool = False,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """One step to x_{t-1} (Karras et al. 2022, algorithm 1): a dict with sample and pred_xstart, that of x_t.

    The time that it runs in is the angle: with their s = cos and sigma = tan of it, x = cos x_0 + sin eps and their ODE
    is dx / dangle = (alpha x - x_0) / sigma, bounded at both ends. In sigma / alpha, which is in the thousands where a
    cosine schedule ends, the first of few steps would lead far astray. ``last`` (t = 0) returns x_0. Other keywords as
    GaussianDiffusion.p_mean_variance.
    """
    x_start = diffusion.p_mean_variance(model, x, t, **kwargs)["pred_xstart"]
    if last:
        return {"sample": x_start, "pred_xstart": x_start}
    table = diffusion.on_device("heun", x.device, x.dtype, lambda: heun_coefficients(diffusion))
    alpha, sigma, angle = _columns(table, t, x.ndim)
    alpha_prev, sigma_prev, angle_prev = _columns(table, t - 1, x.ndim)
    slope = (alpha * x - x_start) / sigma
    euler = x + (angle_prev - angle) * slope
    x_start_prev = diffusion.p_mean_variance(model, euler, t - 1, **kwargs)["pred_xstart"]
    slope_prev = (alpha_prev * euler - x_start_prev) / sigma_prev
    return {"sample": x + (angle_prev - angle) * (slope + slope_prev) / 2, "pred_xstart": x_start}


def heun_loop(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | Philox | None = None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None = None,
    device: torch.device | str | None = None,
    pred_xstart: bool = True,
    **kwargs: Any,
) -> Iterator[dict[str, Tensor]]:
    """Every step's dict, see GaussianDiffusion.heun_sample_loop_progressive."""
    x, steps = begin(diffusion, model, shape, noise, step_noise, device)
    for place, (t, _) in enumerate(steps, start=1):
        with torch.no_grad():
            out = heun_step(diffusion, model, x, t, last=place == diffusion.num_timesteps, **kwargs)
        x = out["sample"]
        yield out if pred_xstart else {"sample": x}


def _columns(table: Tensor, t: Tensor, ndim: int) -> list[Tensor]:
    """The table's columns at t, each as (N, 1, ...) of ``ndim`` dimensions."""
    return [column.view(-1, *[1] * (ndim - 1)) for column in table[t].unbind(1)]
