"""Bits per dimension: the variational bound on the likelihood of images (DDPM, section 3)."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.diffusion.noise import draws_of
from fastdiff.kernels.diffusion_loss.reference import mean_flat, normal_kl

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion


def prior_bpd(diffusion: "GaussianDiffusion", x_start: Tensor) -> Tensor:
    """The bound's prior term L_T, see GaussianDiffusion.prior_bpd."""
    t = torch.full((x_start.shape[0],), diffusion.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_start, t)
    zero = torch.zeros((), dtype=mean.dtype, device=mean.device)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


@torch.no_grad()
def calc_bpd_loop(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    clip_denoised: bool,
    model_kwargs: Mapping[str, Any] | None,
    step_noise: Tensor | Iterable[Tensor] | None,
) -> dict[str, Tensor]:
    """Every term of the bound, see GaussianDiffusion.calc_bpd_loop."""
    draws = draws_of(step_noise)
    columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((x_start.shape[0],), step, device=x_start.device)
        given = next(draws)
        noise = torch.randn_like(x_start) if given is None else given
        x_t = diffusion.q_sample(x_start, t, noise)
        out = diffusion.vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
        columns["vb"].append(out["output"])
        columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
        eps = diffusion.eps_from_xstart(x_t, t, out["pred_xstart"])
        columns["mse"].append(mean_flat((eps - noise) ** 2))
    terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}  # (N, T)
    prior = prior_bpd(diffusion, x_start)
    return {"total_bpd": terms["vb"].sum(dim=1) + prior, "prior_bpd": prior, **terms}
