"""Shared by the kernels of diffusion_step and diffusion_loss: columns of the tables, x_0, and memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.gaussian.parameterization import TABLES

WIDTH = tl.constexpr(len(TABLES))
ALPHAS_CUMPROD_PREV = tl.constexpr(TABLES.index("alphas_cumprod_prev"))
ONE_MINUS_ALPHAS_CUMPROD_PREV = tl.constexpr(TABLES.index("one_minus_alphas_cumprod_prev"))
SQRT_RECIP_ALPHAS_CUMPROD = tl.constexpr(TABLES.index("sqrt_recip_alphas_cumprod"))
SQRT_RECIPM1_ALPHAS_CUMPROD = tl.constexpr(TABLES.index("sqrt_recipm1_alphas_cumprod"))
POSTERIOR_MEAN_COEF1 = tl.constexpr(TABLES.index("posterior_mean_coef1"))
POSTERIOR_MEAN_COEF2 = tl.constexpr(TABLES.index("posterior_mean_coef2"))
POSTERIOR_VARIANCE = tl.constexpr(TABLES.index("posterior_variance"))
POSTERIOR_LOG_VARIANCE = tl.constexpr(TABLES.index("posterior_log_variance_clipped"))
FIXED_LARGE_VARIANCE = tl.constexpr(TABLES.index("fixed_large_variance"))
FIXED_LARGE_LOG_VARIANCE = tl.constexpr(TABLES.index("fixed_large_log_variance"))
LOG_BETAS = tl.constexpr(TABLES.index("log_betas"))
SQRT_ALPHAS_CUMPROD = tl.constexpr(TABLES.index("sqrt_alphas_cumprod"))
SQRT_ONE_MINUS_ALPHAS_CUMPROD = tl.constexpr(TABLES.index("sqrt_one_minus_alphas_cumprod"))
LOSS_WEIGHT = tl.constexpr(TABLES.index("loss_weight"))


@triton.jit
def xstart_coefficients(row, MEAN_TYPE: tl.constexpr):
    """The coefficients of predict_xstart from t's row of the tables."""
    if MEAN_TYPE == "epsilon":
        a = tl.load(row + SQRT_RECIP_ALPHAS_CUMPROD)
        b = tl.load(row + SQRT_RECIPM1_ALPHAS_CUMPROD)
    elif MEAN_TYPE == "v":
        a = tl.load(row + SQRT_ALPHAS_CUMPROD)
        b = tl.load(row + SQRT_ONE_MINUS_ALPHAS_CUMPROD)
    elif MEAN_TYPE == "flow":
        sigma = tl.load(row + SQRT_ONE_MINUS_ALPHAS_CUMPROD)
        total = tl.load(row + SQRT_ALPHAS_CUMPROD) + sigma
        a = tl.math.div_rn(1.0, total)
        b = tl.math.div_rn(sigma, total)
    else:
        b = tl.load(row + POSTERIOR_MEAN_COEF1)
        a = tl.math.div_rn(tl.load(row + POSTERIOR_MEAN_COEF2), b)
    return a, b


@triton.jit
def predict_xstart(x, output, a, b, MEAN_TYPE: tl.constexpr):
    """The x_0 that the model output implies."""
    if MEAN_TYPE == "start_x":
        xstart = output
    elif MEAN_TYPE == "previous_x":
        xstart = tl.math.div_rn(output, b) - a * x
    else:
        xstart = a * x - b * output
    return xstart


@triton.jit
def load(pointer, mask):
    """Load in fp32, 0 outside the mask."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of x's shape: channels_last if x is dense in that layout, else contiguous."""
    if x.movedim(1, -1).is_contiguous():
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def strides(name: str, x: Tensor) -> dict[str, int]:
    """The strides of x (N, C, S) as kernel arguments."""
    return dict(zip((f"{name}_n", f"{name}_c", f"{name}_p"), x.stride(), strict=True))
