"""Functions that both passes share: tiles, and the terms of the objectives on a tile."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.diffusion_loss.bound import bound
from fastdiff.kernels.gaussian.kernel import (
    POSTERIOR_MEAN_COEF1,
    POSTERIOR_MEAN_COEF2,
    SQRT_ALPHAS_CUMPROD,
    SQRT_ONE_MINUS_ALPHAS_CUMPROD,
    load,
)


@triton.jit
def tile_of(index, pixels, CHANNELS: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Pixels (P, 1), channels (1, C) and mask (P, C) of tile ``index`` of a sample, channels fastest."""
    chunks: tl.constexpr = (CHANNELS + C - 1) // C
    p = tl.cast(index // chunks, tl.int64) * P + tl.arange(0, P)[:, None]
    c = tl.cast(index % chunks, tl.int64) * C + tl.arange(0, C)[None, :]
    return p, c, (p < pixels) & (c < CHANNELS)


@triton.jit
def terms(
    output,
    x_start,
    x_t,
    noise,
    row,
    step,
    n,
    p,
    c,
    mask,
    output_n,
    output_c,
    output_p,
    x_start_n,
    x_start_c,
    x_start_p,
    x_t_n,
    x_t_c,
    x_t_p,
    noise_n,
    noise_c,
    noise_p,
    CHANNELS: tl.constexpr,
    MEAN_TYPE: tl.constexpr,
    VAR_TYPE: tl.constexpr,
    MSE: tl.constexpr,
    VB: tl.constexpr,
):
    """output - target on one tile, and the bound with its derivatives by output and values."""
    at = output + n * output_n + c * output_c + p * output_p
    out = load(at, mask)
    nothing = tl.zeros_like(out)
    difference, bits, by_output, by_values = nothing, nothing, nothing, nothing
    # load only what the objective needs
    start, xt = out, out
    if VB or MEAN_TYPE != "epsilon":
        start = load(x_start + n * x_start_n + c * x_start_c + p * x_start_p, mask)
    if VB or MEAN_TYPE == "previous_x":
        xt = load(x_t + n * x_t_n + c * x_t_c + p * x_t_p, mask)
    if VB:
        values = out
        if VAR_TYPE == "learned" or VAR_TYPE == "learned_range":
            values = load(at + CHANNELS * tl.cast(output_c, tl.int64), mask)
        bits, by_output, by_values = bound(start, xt, out, values, row, step, MEAN_TYPE, VAR_TYPE)
    if MSE:
        if MEAN_TYPE == "epsilon":
            target = load(noise + n * noise_n + c * noise_c + p * noise_p, mask)
        elif MEAN_TYPE == "start_x":
            target = start
        elif MEAN_TYPE == "v" or MEAN_TYPE == "flow":
            drawn = load(noise + n * noise_n + c * noise_c + p * noise_p, mask)
            if MEAN_TYPE == "flow":
                target = drawn - start
            else:
                alpha, sigma = tl.load(row + SQRT_ALPHAS_CUMPROD), tl.load(row + SQRT_ONE_MINUS_ALPHAS_CUMPROD)
                target = alpha * drawn - sigma * start
        else:
            target = tl.load(row + POSTERIOR_MEAN_COEF1) * start + tl.load(row + POSTERIOR_MEAN_COEF2) * xt
        difference = out - target
    return difference, bits, by_output, by_values
