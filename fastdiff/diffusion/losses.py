"""The training objectives: mean squared error, the variational bound, and the hybrid of both."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.kernels import diffusion_loss
from fastdiff.kernels.diffusion_loss.reference import bound
from fastdiff.kernels.gaussian.reference import coefficients

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion


def vb_terms_bpd(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    clip_denoised: bool,
    model_kwargs: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    """One term of the variational bound (DDPM equation 5), see GaussianDiffusion.vb_terms_bpd."""
    out = diffusion.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
    at = coefficients(diffusion.step_tables(x_t.device, x_t.dtype), t, x_t.ndim)
    terms = bound(out["mean"], out["log_variance"], x_start, x_t, t, at)
    return {"output": terms, "pred_xstart": out["pred_xstart"]}


def training_losses(
    diffusion: "GaussianDiffusion",
    model: Callable[..., Tensor],
    x_start: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
    noise: Tensor | None,
) -> dict[str, Tensor]:
    """The configured objective, see GaussianDiffusion.training_losses."""
    noise = torch.randn_like(x_start) if noise is None else noise
    x_t = diffusion.q_sample(x_start, t, noise)
    terms = diffusion_loss(
        diffusion.model_output(model, x_t, t, model_kwargs),
        x_start,
        x_t,
        noise,
        t,
        diffusion.step_tables(x_t.device, x_t.dtype),
        mean_type=diffusion.model_mean_type,
        var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        backend=diffusion.kernels,
    )
    if diffusion.loss_type.is_vb:
        return {"loss": terms.loss}
    return {name: value for name, value in terms._asdict().items() if value is not None}
