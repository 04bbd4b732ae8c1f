"""The definition of diffusion_step: the original operations in their order."""

import torch
from torch import Tensor

from fastdiff.kernels.gaussian import ModelMeanType, ModelVarType, Sampler
from fastdiff.kernels.gaussian.reference import Coefficients, Prediction, coefficients, eps_from_xstart, predict
from fastdiff.kernels.philox.pytorch import philox_normal


def diffusion_step(
    x: Tensor,
    model_output: Tensor,
    t: Tensor,
    tables: Tensor,
    noise: Tensor | None,
    seed: int,
    samples: Tensor | None,
    mean_type: ModelMeanType,
    var_type: ModelVarType,
    sampler: Sampler,
    eta: float,
    clip: bool,
    pred_xstart: bool,
) -> tuple[Tensor, Tensor | None]:
    """The definition, see op.py. Computes in fp32, or in float64 if x is float64."""
    at = coefficients(tables, t, x.ndim)
    prediction = predict(x, model_output, at, mean_type, var_type, clip)
    if sampler is Sampler.DDPM or eta:
        noise = drawn(x, t, tables.shape[0], seed, samples) if noise is None else noise
    sample = advance(prediction, x, t, at, sampler, eta, noise)
    return sample, prediction.pred_xstart if pred_xstart else None


def advance(
    p: Prediction, x: Tensor, t: Tensor, at: Coefficients, sampler: Sampler, eta: float, noise: Tensor | None
) -> Tensor:
    """x_{t-1}, drawn from p (DDPM algorithm 2) or computed by Song et al. 2021, equation 12."""
    if sampler is Sampler.DDPM:
        assert noise is not None
        return p.mean + _unless_first(t, x) * torch.exp(0.5 * p.log_variance) * noise
    eps = eps_from_xstart(x, p.pred_xstart, at)
    alpha_bar, alpha_bar_prev = at["alphas_cumprod"], at["alphas_cumprod_prev"]
    sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
    sample = p.pred_xstart * alpha_bar_prev.sqrt() + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
    if eta:
        assert noise is not None
        sample = sample + _unless_first(t, x) * sigma * noise
    return sample


def drawn(x: Tensor, t: Tensor, steps: int, seed: int, samples: Tensor | None) -> Tensor:
    """Philox noise of x's shape for the update at t. Step 0 is the noise of x_T, so that t = T-1 is step 1."""
    if samples is None:
        samples = torch.arange(len(x), device=x.device)
    return philox_normal(seed, samples, steps - t, x.shape[1:].numel()).view(x.shape)


def _unless_first(t: Tensor, like: Tensor) -> Tensor:
    """1 where t > 0 and 0 where t = 0, as (N, 1, ...): the last step adds no noise."""
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))
