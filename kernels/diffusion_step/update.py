"""The update in one pass over x_t and the model output."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.arithmetic import exp, reciprocal
from fastdiff.kernels.gaussian.kernel import (
    ALPHAS_CUMPROD_PREV,
    FIXED_LARGE_VARIANCE,
    LOG_BETAS,
    ONE_MINUS_ALPHAS_CUMPROD_PREV,
    POSTERIOR_LOG_VARIANCE,
    POSTERIOR_MEAN_COEF1,
    POSTERIOR_MEAN_COEF2,
    POSTERIOR_VARIANCE,
    SQRT_RECIP_ALPHAS_CUMPROD,
    SQRT_RECIPM1_ALPHAS_CUMPROD,
    WIDTH,
    load,
    predict_xstart,
    xstart_coefficients,
)
from fastdiff.kernels.philox.generator import draw_normals, in_a_row


@triton.jit(do_not_specialize=["seed", "steps"])
def diffusion_step(
    sample,
    pred,
    x,
    output,
    noise,
    t,
    samples,
    tables,
    seed: tl.int64,
    steps: tl.int64,
    eta,
    pixels,
    blocks,
    sample_n,
    sample_c,
    sample_p,
    x_n,
    x_c,
    x_p,
    output_n,
    output_c,
    output_p,
    noise_n,
    noise_c,
    noise_p,
    t_n,
    samples_n,
    CHANNELS: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    MEAN_TYPE: tl.constexpr,
    VAR_TYPE: tl.constexpr,
    SAMPLER: tl.constexpr,
    NOISY: tl.constexpr,
    CLIP: tl.constexpr,
    B: tl.constexpr,
):
    """DDPM: x_{t-1} = c1 x_0 + c2 x_t + std z;  DDIM: x_{t-1} = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma z

    All tensors are (N, C, pixels) with any strides; arithmetic is fp32. One program per (n, B pixels) loops over the
    channels, so that after the first one the sectors of a channels-last output come from L1. Four consecutive pixels
    share a Philox counter. If the pixels are not a multiple of four, one program per (n, B elements in NCHW order).
    """
    n = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * B
    step = tl.load(t + n * t_n)
    row = tables + step * WIDTH
    a, b = xstart_coefficients(row, MEAN_TYPE)
    if SAMPLER == "ddim":
        variance = eta * eta * tl.load(row + POSTERIOR_VARIANCE)
        of_xstart = tl.math.sqrt_rn(tl.load(row + ALPHAS_CUMPROD_PREV))
        of_eps = tl.math.sqrt_rn(tl.load(row + ONE_MINUS_ALPHAS_CUMPROD_PREV) - variance)
        # eps = (sqrt(1 / alpha_bar) x_t - x_0) / sqrt(1 / alpha_bar - 1)
        scale = tl.load(row + SQRT_RECIP_ALPHAS_CUMPROD)
        inverse = reciprocal(tl.load(row + SQRT_RECIPM1_ALPHAS_CUMPROD))
        std = tl.math.sqrt_rn(variance)
    else:
        of_xstart, of_x = tl.load(row + POSTERIOR_MEAN_COEF1), tl.load(row + POSTERIOR_MEAN_COEF2)
        std = tl.math.sqrt_rn(
            tl.load(row + (FIXED_LARGE_VARIANCE if VAR_TYPE == "fixed_large" else POSTERIOR_VARIANCE))
        )
        if VAR_TYPE == "learned_range":
            log_ratio = tl.load(row + LOG_BETAS) - tl.load(row + POSTERIOR_LOG_VARIANCE)
    not_first = tl.where(step != 0, 1.0, 0.0)
    if NOISY and noise is None:
        index = n if samples is None else tl.load(samples + n * samples_n)

    for channel in range(CHANNELS if BY_CHANNEL else 1):
        i = start + tl.arange(0, B)
        if BY_CHANNEL:
            c = tl.cast(channel, tl.int64)
            p = i
            mask = i < pixels
            first = c * pixels + start
        else:
            c = i // pixels
            p = i % pixels
            mask = i < CHANNELS * pixels
            first = start
        xt = load(x + n * x_n + c * x_c + p * x_p, mask)
        at_output = output + n * output_n + c * output_c + p * output_p
        out = load(at_output, mask)
        xstart = predict_xstart(xt, out, a, b, MEAN_TYPE)
        if CLIP:
            xstart = tl.clamp(xstart, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        if NOISY:
            if noise is None:
                z0, z1, z2, z3 = draw_normals(seed, index, steps - step, first // 4 + tl.arange(0, B // 4))
                z = in_a_row(z0, z1, z2, z3)
            else:
                z = load(noise + n * noise_n + c * noise_c + p * noise_p, mask)
            z *= not_first
        if SAMPLER == "ddim":
            new = of_xstart * xstart + of_eps * ((scale * xt - xstart) * inverse)
            if NOISY:
                new += std * z
        else:
            mean = out if MEAN_TYPE == "previous_x" else of_xstart * xstart + of_x * xt
            if VAR_TYPE == "learned":
                new = mean + exp(0.5 * load(at_output + CHANNELS * tl.cast(output_c, tl.int64), mask)) * z
            elif VAR_TYPE == "learned_range":
                # log(sigma^2 / posterior variance) / 2
                half = 0.25 * (load(at_output + CHANNELS * tl.cast(output_c, tl.int64), mask) + 1.0) * log_ratio
                new = mean + std * exp(half) * z
            else:
                new = mean + std * z
        at_sample = n * sample_n + c * sample_c + p * sample_p
        tl.store(sample + at_sample, new, mask=mask)
        if pred is not None:
            tl.store(pred + at_sample, xstart, mask=mask)
