"""The backward pass: one launch, two if the pixels are split, and one more for the parameters (parameters.py)."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.group_norm_silu.gradients import (
    affine,
    gradient,
    of_xhat,
    point_and_dz,
    saved,
    sums,
    write_sums,
)
from fastdiff.kernels.group_norm_silu.tile import inside, negative, over_groups, place, ratio, read, write


@triton.jit
def group_norm_silu_backward(
    x,
    input_bias,
    dy,
    weight,
    bias,
    scale,
    shift,
    mean_high,
    mean_low,
    rstd,
    other,
    dx,
    sum_dz_out,
    sum_dz_xhat_out,
    sum_dx_out,
    dscale,
    dshift,
    channels,
    pixels,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
    ON_CHIP: tl.constexpr,
):
    """dx plus ``other``, dscale, dshift, and the sums of dz, dz * xhat and dx over the pixels, fp32 (N, C).

    The sum of dx, without ``other``, is wanted for the gradient of an input bias only. ``other`` may be Joined(None),
    because Triton 3.6 cannot compare a tuple of None with None.

    Grid: one program per sample and block of GROUPS groups of DEPTH channels.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, False)
    a, b = affine(weight, bias, scale, shift, n, c, real)
    high, low, r = saved(mean_high, mean_low, rstd, n, c, real, channels, DEPTH)
    minus_bias = negative(input_bias, c, real)
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    values = DEPTH * tl.cast(pixels, tl.float32)
    p = tl.arange(0, BLOCK_PIXELS)
    if ON_CHIP:
        mask = inside(real, p, pixels, EVEN)
        u, dz = point_and_dz(x, dy, n, c, 0, p, mask, minus_bias, high, low, r, a, b, SILU, "", False)
        sum_dz, sum_dz_xhat = tl.sum(dz, 1), of_xhat(tl.sum(dz * u, 1), r, EXACT)
    else:
        sum_dz, sum_dz_xhat = sums(
            x,
            dy,
            n,
            c,
            real,
            minus_bias,
            high,
            low,
            r,
            a,
            b,
            0,
            pixels,
            SILU,
            BLOCK_CHANNELS,
            BLOCK_PIXELS,
            EVEN,
            STAGES,
            KEPT,
        )
    write_sums(sum_dz, sum_dz_xhat, weight, bias, sum_dz_out, sum_dz_xhat_out, dscale, dshift, n, c, real, channels)
    middle = ratio(over_groups(a * sum_dz, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    slope = ratio(over_groups(a * sum_dz_xhat, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    if ON_CHIP:
        value = gradient(u, dz, minus_bias, high, r, a, middle, slope, EXACT, False)
        if sum_dx_out is not None:
            tl.store(sum_dx_out + n * channels + c, tl.sum(value if EVEN else tl.where(mask, value, 0.0), 1), mask=real)
        if other.first is not None:
            value += read(other, n, c, 0, p, mask, "")
        write(dx, value, n, c, 0, p, mask)
    else:
        if sum_dx_out is not None:
            sum_dx = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
        for done in tl.range(0, pixels, BLOCK_PIXELS, num_stages=STAGES):
            at = tl.cdiv(pixels, BLOCK_PIXELS) * BLOCK_PIXELS - BLOCK_PIXELS - done
            mask = inside(real, at + p, pixels, EVEN)
            hint: tl.constexpr = "evict_first" if KEPT else ""
            u, dz = point_and_dz(x, dy, n, c, at, p, mask, minus_bias, high, low, r, a, b, SILU, hint, True)
            value = gradient(u, dz, minus_bias, high, r, a, middle, slope, EXACT, True)
            if sum_dx_out is not None:
                sum_dx += value if EVEN else tl.where(mask, value, 0.0)
            if other.first is not None:
                value += read(other, n, c, at, p, mask, "")
            write(dx, value, n, c, at, p, mask)
        if sum_dx_out is not None:
            tl.store(sum_dx_out + n * channels + c, tl.sum(sum_dx, 1), mask=real)


@triton.jit
def group_norm_silu_backward_sums(
    x,
    input_bias,
    dy,
    weight,
    bias,
    scale,
    shift,
    mean_high,
    mean_low,
    rstd,
    partial_dz,
    partial_dz_xhat,
    channels,
    pixels,
    pixels_per_split,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sums of dz and of dz * xhat over the pixels of a split, fp32 (N, splits, C).

    Grid: one program per sample and block of groups, times the splits of the pixels.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, False)
    a, b = affine(weight, bias, scale, shift, n, c, real)
    high, low, r = saved(mean_high, mean_low, rstd, n, c, real, channels, DEPTH)
    minus_bias = negative(input_bias, c, real)
    start = tl.program_id(1) * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    sum_dz, sum_dz_xhat = sums(
        x,
        dy,
        n,
        c,
        real,
        minus_bias,
        high,
        low,
        r,
        a,
        b,
        start,
        stop,
        SILU,
        BLOCK_CHANNELS,
        BLOCK_PIXELS,
        EVEN,
        STAGES,
        KEPT,
    )
    at = (n * tl.num_programs(1) + tl.program_id(1)) * channels + c
    tl.store(partial_dz + at, sum_dz, mask=real)
    tl.store(partial_dz_xhat + at, sum_dz_xhat, mask=real)


@triton.jit
def group_norm_silu_backward_apply(
    x,
    input_bias,
    dy,
    weight,
    bias,
    scale,
    shift,
    mean_high,
    mean_low,
    rstd,
    partial_dz,
    partial_dz_xhat,
    other,
    dx,
    sum_dz_out,
    sum_dz_xhat_out,
    sum_dx_out,
    dscale,
    dshift,
    channels,
    pixels,
    pixels_per_split,
    SILU: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Write the outputs of the single launch from the sums of ``group_norm_silu_backward_sums``.

    The grid is the same but runs in reverse: the values that were read last are still in the cache.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, True)
    splits = tl.num_programs(1)
    split = splits - 1 - tl.program_id(1)
    a, b = affine(weight, bias, scale, shift, n, c, real)
    high, low, r = saved(mean_high, mean_low, rstd, n, c, real, channels, DEPTH)
    minus_bias = negative(input_bias, c, real)

    s = tl.arange(0, BLOCK_SPLITS)
    present = (s < splits)[:, None] & real[None, :]
    partial = (n * splits + s[:, None]) * channels + c[None, :]
    sum_dz = tl.sum(tl.load(partial_dz + partial, mask=present, other=0.0), 0)
    sum_dz_xhat = tl.sum(tl.load(partial_dz_xhat + partial, mask=present, other=0.0), 0)
    write_sums(
        sum_dz,
        sum_dz_xhat,
        weight,
        bias,
        sum_dz_out,
        sum_dz_xhat_out,
        dscale,
        dshift,
        n,
        c,
        real & (split == 0),
        channels,
    )

    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    values = DEPTH * tl.cast(pixels, tl.float32)
    middle = ratio(over_groups(a * sum_dz, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    slope = ratio(over_groups(a * sum_dz_xhat, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    p = tl.arange(0, BLOCK_PIXELS)
    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    if sum_dx_out is not None:
        sum_dx = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for at in tl.range(start, stop, BLOCK_PIXELS, num_stages=STAGES):
        mask = inside(real, at + p, stop, EVEN)
        hint: tl.constexpr = "evict_first" if KEPT else ""
        u, dz = point_and_dz(x, dy, n, c, at, p, mask, minus_bias, high, low, r, a, b, SILU, hint, True)
        value = gradient(u, dz, minus_bias, high, r, a, middle, slope, EXACT, True)
        if sum_dx_out is not None:
            sum_dx += value if EVEN else tl.where(mask, value, 0.0)
        if other.first is not None:
            value += read(other, n, c, at, p, mask, "")
        write(dx, value, n, c, at, p, mask)
    if sum_dx_out is not None:
        tl.store(sum_dx_out + (n * splits + split) * channels + c, tl.sum(sum_dx, 1), mask=real)
