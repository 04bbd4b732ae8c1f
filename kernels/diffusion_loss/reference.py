"""The definition of diffusion_loss: the original operations in their order."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.gaussian import TABLES, LossType, ModelMeanType, ModelVarType
from fastdiff.kernels.gaussian.reference import Coefficients, coefficients, posterior_mean, predict


def diffusion_loss(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    noise: Tensor,
    t: Tensor,
    tables: Tensor,
    mean_type: ModelMeanType,
    var_type: ModelVarType,
    loss_type: LossType,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition, see op.py. Computes in fp32, or in float64 if x_t is float64."""
    steps = tables.shape[0]
    at = coefficients(tables, t, x_t.ndim)
    if loss_type.is_vb:
        vb = _vb(model_output, x_start, x_t, t, at, mean_type, var_type)
        return (steps if loss_type is LossType.RESCALED_KL else 1) * vb, None, vb
    channels = x_t.shape[1]
    output = model_output[:, :channels]
    match mean_type:
        case ModelMeanType.PREVIOUS_X:
            target = posterior_mean(x_start, x_t, at)
        case ModelMeanType.START_X:
            target = x_start
        case ModelMeanType.EPSILON:
            target = noise
        case ModelMeanType.V:
            target = at["sqrt_alphas_cumprod"] * noise - at["sqrt_one_minus_alphas_cumprod"] * x_start
        case ModelMeanType.FLOW:
            target = noise - x_start
    wide = torch.promote_types(x_t.dtype, torch.float32)
    mse = mean_flat(F.mse_loss(output.to(wide), target.to(wide), reduction="none"))
    weighted = tables[t, TABLES.index("loss_weight")] * mse
    if not var_type.learned:
        return weighted, mse, None
    # The bound trains only the variance: the mean is detached (improved DDPM, section 3.1).
    frozen = torch.cat([output.detach(), model_output[:, channels:]], dim=1)
    vb = _vb(frozen, x_start, x_t, t, at, mean_type, var_type)
    if loss_type is LossType.RESCALED_MSE:
        vb = vb * (steps / 1000.0)
    return weighted + vb, mse, vb


def _vb(
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    at: Coefficients,
    mean_type: ModelMeanType,
    var_type: ModelVarType,
) -> Tensor:
    p = predict(x_t, model_output, at, mean_type, var_type, clip=False)
    return bound(p.mean, p.log_variance, x_start, x_t, t, at)


def bound(mean: Tensor, log_variance: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, at: Coefficients) -> Tensor:
    """The variational bound's term at t in bits per dimension (DDPM equation 5), for N(mean, exp log_variance). (N,)"""
    true_mean, true_log_variance = posterior_mean(x_start, x_t, at), at["posterior_log_variance_clipped"]
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
    return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)


def mean_flat(x: Tensor) -> Tensor:
    """The mean over all but the first dimension, (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) element by element, in nats."""
    squared = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + squared)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function with which the model family is trained."""
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
