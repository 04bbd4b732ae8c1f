"""The gradient with respect to the model output, in one pass."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.diffusion_loss.tile import terms, tile_of
from fastdiff.kernels.gaussian.kernel import LOSS_WEIGHT, WIDTH


@triton.jit
def diffusion_loss_backward(
    grad_output,
    grad_mse,
    grad_vb,
    grad_loss,
    output,
    x_start,
    x_t,
    noise,
    t,
    tables,
    per_mse,
    per_vb,
    loss_of_vb,
    pixels,
    tiles,
    grad_output_n,
    grad_output_c,
    grad_output_p,
    grad_mse_n,
    grad_vb_n,
    grad_loss_n,
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
    t_n,
    CHANNELS: tl.constexpr,
    MEAN_TYPE: tl.constexpr,
    VAR_TYPE: tl.constexpr,
    MSE: tl.constexpr,
    VB: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """d output = 2 g (output - target) / per_mse or, without mse, g' d bound / d output / per_vb;
    d values = g' d bound / d values / per_vb;  g and g' are the gradients of mse and vb, including those through loss

    All tensors are (N, C, pixels) with any strides; the incoming gradients are (N,) or None. One program per (sample,
    tile of P pixels by C channels); arithmetic is fp32.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p, c, mask = tile_of(tl.program_id(0) % tiles, pixels, CHANNELS, P, C)
    step = tl.load(t + n * t_n)
    row = tables + step * WIDTH
    difference, _, by_output, by_values = terms(
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
        CHANNELS,
        MEAN_TYPE,
        VAR_TYPE,
        MSE,
        VB,
    )
    by_mse = 0.0  # from here on: before terms() these would take registers through the whole of it
    by_vb = 0.0
    if grad_loss is not None:
        by_mse = tl.load(grad_loss + n * grad_loss_n)
        by_vb = by_mse * loss_of_vb
        if MSE:
            by_mse *= tl.load(row + LOSS_WEIGHT)
    if grad_mse is not None:
        by_mse += tl.load(grad_mse + n * grad_mse_n)
    if grad_vb is not None:
        by_vb += tl.load(grad_vb + n * grad_vb_n)
    by_mse = tl.math.div_rn(2.0 * by_mse, per_mse)
    by_vb = tl.math.div_rn(by_vb, per_vb)
    grad = by_mse * difference if MSE else by_vb * by_output
    at = grad_output + n * grad_output_n + c * grad_output_c + p * grad_output_p
    tl.store(at, grad, mask=mask)
    if VAR_TYPE == "learned" or VAR_TYPE == "learned_range":
        tl.store(at + CHANNELS * grad_output_c, by_vb * by_values, mask=mask)
