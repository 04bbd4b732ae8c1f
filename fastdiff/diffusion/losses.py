"""The training objectives: mean squared error, the variational bound, and the hybrid of both."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.parameterization import LossType, ModelMeanType

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the first dimension, (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) element by element, in nats."""
    squared = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + squared)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function that the family is trained with."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log probability of 8-bit pixels x, scaled to [-1, 1], under N(means, exp(2 log_scales)) (DDPM equation 13)."""
    centered = x - means
    inv_stdv = torch.exp(-log_scales)
    cdf_above = approx_standard_normal_cdf(inv_stdv * (centered + 1.0 / 255.0))
    cdf_below = approx_standard_normal_cdf(inv_stdv * (centered - 1.0 / 255.0))
    tiny = 1e-12
    return torch.where(
        x < -0.999,  # black: everything below counts
        cdf_above.clamp(min=tiny).log(),
        torch.where(x > 0.999, (1.0 - cdf_below).clamp(min=tiny).log(), (cdf_above - cdf_below).clamp(min=tiny).log()),
    )


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
    true_mean, _, true_log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    out = diffusion.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
    kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
    nll = -discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
    terms = torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)
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
    if diffusion.loss_type.is_vb:
        scale = diffusion.num_timesteps if diffusion.loss_type is LossType.RESCALED_KL else 1
        return {"loss": scale * vb_terms_bpd(diffusion, model, x_start, x_t, t, False, model_kwargs)["output"]}
    output, var_values = diffusion.model_output(model, x_t, t, model_kwargs)
    terms: dict[str, Tensor] = {}
    if diffusion.model_var_type.learned:
        # The bound teaches the variance alone: its mean is detached (improved DDPM, section 3.1).
        frozen = torch.cat([output.detach(), var_values], dim=1)
        terms["vb"] = vb_terms_bpd(diffusion, lambda *_, **__: frozen, x_start, x_t, t, False, None)["output"]
        if diffusion.loss_type is LossType.RESCALED_MSE:
            terms["vb"] = terms["vb"] * (diffusion.num_timesteps / 1000.0)
    match diffusion.model_mean_type:
        case ModelMeanType.PREVIOUS_X:
            target, _, _ = diffusion.q_posterior_mean_variance(x_start, x_t, t)
        case ModelMeanType.START_X:
            target = x_start
        case ModelMeanType.EPSILON:
            target = noise
    terms["mse"] = mean_flat(F.mse_loss(output, target, reduction="none"))
    terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
    return terms
