"""Bits per dimension: the variational bound on the likelihood of images (DDPM, section 3)."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.diffusion.noise import Philox, draws_of
from fastdiff.kernels import philox_normal
from fastdiff.kernels.diffusion_loss.reference import mean_flat, normal_kl

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion


def prior_bpd(diffusion: "GaussianDiffusion", x_start: Tensor) -> Tensor:
    """The bound's prior term L_T, see GaussianDiffusion.prior_bpd."""
    t = torch.full((x_start.shape[0],), diffusion.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_start, t)
    zero = torch.zeros((), dtype=mean.dtype, device=mean.device)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


def calc_bpd_loop_progressive(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    clip_denoised: bool,
    model_kwargs: Mapping[str, Any] | None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None,
) -> Iterator[dict[str, Tensor]]:
    """The terms step by step, see GaussianDiffusion.calc_bpd_loop_progressive."""
    draws = _noise_of_steps(diffusion, step_noise, x_start.shape)
    for step in reversed(range(diffusion.num_timesteps)):
        given = next(draws)
        with torch.no_grad():
            t = torch.full((x_start.shape[0],), step, device=x_start.device)
            noise = torch.randn_like(x_start) if given is None else given
            x_t = diffusion.q_sample(x_start, t, noise)
            out = diffusion.vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = diffusion.eps_from_xstart(x_t, t, out["pred_xstart"])
            terms = {
                "vb": out["output"],
                "xstart_mse": mean_flat((out["pred_xstart"] - x_start) ** 2),
                "mse": mean_flat((eps - noise) ** 2),
            }
        yield terms


def calc_bpd_loop(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    clip_denoised: bool,
    model_kwargs: Mapping[str, Any] | None,
    step_noise: Tensor | Philox | Iterable[Tensor] | None,
) -> dict[str, Tensor]:
    """Every term of the bound, see GaussianDiffusion.calc_bpd_loop."""
    steps = list(calc_bpd_loop_progressive(diffusion, model, x_start, clip_denoised, model_kwargs, step_noise))
    terms = {name: torch.stack([step[name] for step in steps], dim=1) for name in steps[0]}  # (N, T)
    with torch.no_grad():
        prior = prior_bpd(diffusion, x_start)
    return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}


def _noise_of_steps(
    diffusion: "GaussianDiffusion", step_noise: Tensor | Philox | Iterable[Tensor] | None, shape: Sequence[int]
) -> Iterator[Tensor | None]:
    if not isinstance(step_noise, Philox):
        return draws_of(step_noise)
    # numbered as the updates of a sampling loop are
    return (
        philox_normal(step_noise.seed, step_noise.samples, step, shape[1:], backend=diffusion.kernels)
        for step in range(1, diffusion.num_timesteps + 1)
    )
