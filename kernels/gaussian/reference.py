"""p(x_{t-1} | x_t) from a model output, with the original operations in their order."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.gaussian.parameterization import TABLES, ModelMeanType, ModelVarType

Coefficients = Mapping[str, Tensor]


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, variance) and the predicted x_0, each of x's shape."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


def coefficients(tables: Tensor, t: Tensor, ndim: int) -> Coefficients:
    """Every table at t by name, as (N, 1, ...) with ``ndim`` dimensions."""
    columns = tables[t].unbind(1)
    return {name: column.view(-1, *[1] * (ndim - 1)) for name, column in zip(TABLES, columns, strict=True)}


def predict(
    x: Tensor,
    model_output: Tensor,
    at: Coefficients,
    mean_type: ModelMeanType,
    var_type: ModelVarType,
    clip: bool,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
) -> Prediction:
    """x: (N, C, ...); model_output: (N, C, ...), or (N, 2C, ...) if the variance is learned.

    ``denoised_fn`` is applied to the predicted x_0 before it is clipped to [-1, 1].
    """
    wide = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    output, var_values = wide[:, : x.shape[1]], wide[:, x.shape[1] :]
    match mean_type:
        case ModelMeanType.EPSILON:
            pred_xstart = at["sqrt_recip_alphas_cumprod"] * x - at["sqrt_recipm1_alphas_cumprod"] * output
        case ModelMeanType.START_X:
            pred_xstart = output
        case ModelMeanType.PREVIOUS_X:
            coef1, coef2 = at["posterior_mean_coef1"], at["posterior_mean_coef2"]
            pred_xstart = output / coef1 - coef2 / coef1 * x
        case ModelMeanType.V:
            pred_xstart = at["sqrt_alphas_cumprod"] * x - at["sqrt_one_minus_alphas_cumprod"] * output
        case ModelMeanType.FLOW:
            # x_t = alpha x_0 + sigma (x_0 + u)
            alpha, sigma = at["sqrt_alphas_cumprod"], at["sqrt_one_minus_alphas_cumprod"]
            pred_xstart = (x - sigma * output) / (alpha + sigma)
    if denoised_fn is not None:
        pred_xstart = denoised_fn(pred_xstart)
    if clip:
        pred_xstart = pred_xstart.clamp(-1, 1)
    mean = output if mean_type is ModelMeanType.PREVIOUS_X else posterior_mean(pred_xstart, x, at)
    return Prediction(mean, *_variance(var_values, at, var_type, x), pred_xstart)


def posterior_mean(x_start: Tensor, x: Tensor, at: Coefficients) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0) (DDPM equation 7)."""
    return at["posterior_mean_coef1"] * x_start + at["posterior_mean_coef2"] * x


def _variance(var_values: Tensor, at: Coefficients, var_type: ModelVarType, x: Tensor) -> tuple[Tensor, Tensor]:
    match var_type:
        case ModelVarType.FIXED_LARGE:
            return at["fixed_large_variance"].expand_as(x), at["fixed_large_log_variance"].expand_as(x)
        case ModelVarType.FIXED_SMALL:
            return at["posterior_variance"].expand_as(x), at["posterior_log_variance_clipped"].expand_as(x)
        case ModelVarType.LEARNED:
            log_variance = var_values
        case ModelVarType.LEARNED_RANGE:
            # improved DDPM equation 15, the model's v in [-1, 1]
            fraction = (var_values + 1) / 2
            log_variance = fraction * at["log_betas"] + (1 - fraction) * at["posterior_log_variance_clipped"]
    return log_variance.exp(), log_variance


def eps_from_xstart(x: Tensor, pred_xstart: Tensor, at: Coefficients) -> Tensor:
    """The noise that x_t and x_0 imply."""
    return (at["sqrt_recip_alphas_cumprod"] * x - pred_xstart) / at["sqrt_recipm1_alphas_cumprod"]
