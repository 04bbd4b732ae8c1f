"""The forward pass in one launch, or in two if the pixels are split among programs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.arithmetic import reciprocal_by_root
from fastdiff.kernels.group_norm_silu.tile import (
    LOG2_E,
    centred,
    exact_silu,
    fast_silu,
    first_of_group,
    inside,
    layer,
    negative,
    over_groups,
    place,
    ratio,
    read,
    two_parts,
    write,
)


@triton.jit
def _moments(
    x,
    n,
    c,
    real,
    minus_bias,
    first,
    start,
    stop,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Mean of x - ``minus_bias`` - ``first`` in two parts and sum of squared deviations of every channel's group.

    Both are over the pixels from start to stop. Every element of the tile has its own statistics over the chunks
    (Welford 1962), which are merged at the end (Chan et al. 1983), so that the loop has no sums across threads.
    """
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    p = tl.arange(0, BLOCK_PIXELS)
    mean = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    deviation = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    chunks = 0.0
    for at in tl.range(start, stop, BLOCK_PIXELS, num_stages=STAGES):
        mask = inside(real, at + p, stop, EVEN)
        value = read(x, n, c, at, p, mask, "evict_last" if KEPT else "") - minus_bias[:, None] - first[:, None]
        difference = value - mean
        if not EVEN:
            difference = tl.where(mask, difference, 0.0)
        chunks += 1.0
        mean += difference * reciprocal_by_root(chunks)
        deviation += difference * (value - mean)
    count = tl.maximum((stop - start - p + BLOCK_PIXELS - 1) // BLOCK_PIXELS, 0).to(tl.float32)[None, :]
    values = DEPTH * tl.cast(stop - start, tl.float32)
    middle = ratio(over_groups(tl.sum(mean * count, 1), GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    apart = tl.where(real[:, None], mean - middle[:, None], 0.0)
    rest = tl.zeros_like(middle)
    if EXACT:
        rest = ratio(over_groups(tl.sum(count * apart, 1), GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    deviation = over_groups(tl.sum(deviation + count * apart * apart, 1), GROUPS, DEPTH, BLOCK_CHANNELS)
    return middle, rest, deviation


@triton.jit
def _rstd(squares, values, eps, EXACT: tl.constexpr):
    """rstd from ``squares``, the sum of squared deviations of ``values`` values."""
    variance = ratio(squares, values, EXACT)
    if EXACT:
        return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    else:
        return tl.rsqrt(variance + eps)


@triton.jit
def _activated(x, minus_bias, high, low, rstd, w, b, gain, offset, SILU: tl.constexpr, EXACT: tl.constexpr):
    """y from a tile of x as it was read, or already without what the next three arguments subtract, which are 0 then.

    In 16 bits one factor and one addend for each channel do it all: their rounding errors, which grow with the mean,
    are below those of x. In fp32 separate factors have fewer roundings in sequence.
    """
    if EXACT:
        z = centred(x - minus_bias[:, None], high, low, EXACT) * (rstd * w)[:, None] + b[:, None]
        z = z * gain[:, None] + offset[:, None]
        return exact_silu(z) if SILU else z
    else:
        factor = rstd * w * gain
        addend = b * gain + offset - (minus_bias + high) * factor
        if SILU:
            return fast_silu(x * (factor * -LOG2_E)[:, None] + (addend * -LOG2_E)[:, None])
        else:
            return x * factor[:, None] + addend[:, None]


@triton.jit
def group_norm_silu_forward(
    x,
    input_bias,
    weight,
    bias,
    scale,
    shift,
    y,
    high_out,
    low_out,
    rstd_out,
    channels,
    pixels,
    eps,
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
    """y, and the mean in two parts and rstd, fp32 (N, G), of x.

    Grid: one program per sample and block of GROUPS groups of DEPTH channels.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, False)
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    first = first_of_group(x, input_bias, n, c, real, DEPTH)
    minus_bias = negative(input_bias, c, real)
    w, b, gain, offset = layer(weight, bias, scale, shift, n, c, real)
    values = DEPTH * tl.cast(pixels, tl.float32)
    p = tl.arange(0, BLOCK_PIXELS)
    if ON_CHIP:
        mask = inside(real, p, pixels, EVEN)
        value = read(x, n, c, 0, p, mask, "") - minus_bias[:, None]
        difference = value - first[:, None]
        if not EVEN:
            difference = tl.where(mask, difference, 0.0)
        mean = over_groups(tl.sum(difference, 1), GROUPS, DEPTH, BLOCK_CHANNELS)
        mean = tl.where(real, ratio(mean, values, EXACT), 0.0)
        high, low = two_parts(first, mean)
        apart = centred(value, high, low, EXACT)
        if not EVEN:
            apart = tl.where(mask, apart, 0.0)
        if EXACT:  # the rounding error of the mean
            rest = over_groups(tl.sum(apart, 1), GROUPS, DEPTH, BLOCK_CHANNELS)
            low += tl.where(real, ratio(rest, values, EXACT), 0.0)
            apart = centred(value, high, low, EXACT)
            if not EVEN:
                apart = tl.where(mask, apart, 0.0)
        deviation = over_groups(tl.sum(apart * apart, 1), GROUPS, DEPTH, BLOCK_CHANNELS)
        rstd = _rstd(deviation, values, eps, EXACT)
        zero = tl.zeros_like(rstd)
        value = _activated(apart, zero, zero, zero, rstd, w, b, gain, offset, SILU, EXACT)
        write(y, value, n, c, 0, p, mask)
    else:
        mean, rest, deviation = _moments(
            x,
            n,
            c,
            real,
            minus_bias,
            first,
            0,
            pixels,
            GROUPS,
            DEPTH,
            BLOCK_CHANNELS,
            BLOCK_PIXELS,
            EVEN,
            STAGES,
            KEPT,
        )
        rstd = _rstd(deviation, values, eps, EXACT)
        high, low = two_parts(first, mean)
        low += rest
        for done in tl.range(0, pixels, BLOCK_PIXELS, num_stages=STAGES):
            at = tl.cdiv(pixels, BLOCK_PIXELS) * BLOCK_PIXELS - BLOCK_PIXELS - done
            mask = inside(real, at + p, pixels, EVEN)
            value = read(x, n, c, at, p, mask, "evict_first" if KEPT else "")
            value = _activated(value, minus_bias, high, low, rstd, w, b, gain, offset, SILU, EXACT)
            write(y, value, n, c, at, p, mask)
    group = n * (channels // DEPTH) + c // DEPTH
    leads = real & (c % DEPTH == 0)
    tl.store(high_out + group, high, mask=leads)
    tl.store(low_out + group, low, mask=leads)
    tl.store(rstd_out + group, rstd, mask=leads)


@triton.jit
def group_norm_silu_statistics(
    x,
    input_bias,
    partial_mean,
    partial_rest,
    partial_deviation,
    channels,
    pixels,
    pixels_per_split,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Mean of x minus its group's first value in two parts, and sum of squared deviations, fp32 (N, splits, G).

    Grid: one program per sample and block of groups, times the splits of the pixels.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, False)
    first = first_of_group(x, input_bias, n, c, real, DEPTH)
    minus_bias = negative(input_bias, c, real)
    start = tl.program_id(1) * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    mean, rest, deviation = _moments(
        x,
        n,
        c,
        real,
        minus_bias,
        first,
        start,
        stop,
        GROUPS,
        DEPTH,
        BLOCK_CHANNELS,
        BLOCK_PIXELS,
        EVEN,
        STAGES,
        KEPT,
    )
    group = (n * tl.num_programs(1) + tl.program_id(1)) * (channels // DEPTH) + c // DEPTH
    leads = real & (c % DEPTH == 0)
    tl.store(partial_mean + group, mean, mask=leads)
    tl.store(partial_rest + group, rest, mask=leads)
    tl.store(partial_deviation + group, deviation, mask=leads)


@triton.jit
def group_norm_silu_apply(
    x,
    input_bias,
    weight,
    bias,
    scale,
    shift,
    partial_mean,
    partial_rest,
    partial_deviation,
    y,
    high_out,
    low_out,
    rstd_out,
    channels,
    pixels,
    pixels_per_split,
    eps,
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
    """Write the outputs of the single launch from the results of ``group_norm_silu_statistics``.

    The grid is the same but runs in reverse: the values that were read last are still in the cache.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, True)
    splits = tl.num_programs(1)
    split = splits - 1 - tl.program_id(1)
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    first = first_of_group(x, input_bias, n, c, real, DEPTH)
    minus_bias = negative(input_bias, c, real)
    w, b, gain, offset = layer(weight, bias, scale, shift, n, c, real)

    s = tl.arange(0, BLOCK_SPLITS)
    present = (s < splits)[:, None] & real[None, :]
    count = DEPTH * tl.maximum(tl.minimum(pixels - s * pixels_per_split, pixels_per_split), 0).to(tl.float32)[:, None]
    partial = (n * splits + s[:, None]) * (channels // DEPTH) + (c // DEPTH)[None, :]
    means = tl.load(partial_mean + partial, mask=present, other=0.0)
    rests = tl.load(partial_rest + partial, mask=present, other=0.0)
    deviations = tl.load(partial_deviation + partial, mask=present, other=0.0)
    values = DEPTH * tl.cast(pixels, tl.float32)
    mean = ratio(tl.sum(count * means, 0), values, EXACT)
    off = tl.where(present, (means - mean[None, :]) + rests, 0.0)
    rstd = _rstd(tl.sum(deviations + count * off * off, 0), values, eps, EXACT)
    high, low = two_parts(first, mean)
    low += ratio(tl.sum(count * off, 0), values, EXACT)

    p = tl.arange(0, BLOCK_PIXELS)
    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    for at in tl.range(start, stop, BLOCK_PIXELS, num_stages=STAGES):
        mask = inside(real, at + p, stop, EVEN)
        value = read(x, n, c, at, p, mask, "evict_first" if KEPT else "")
        value = _activated(value, minus_bias, high, low, rstd, w, b, gain, offset, SILU, EXACT)
        write(y, value, n, c, at, p, mask)
    group = n * (channels // DEPTH) + c // DEPTH
    leads = real & (c % DEPTH == 0) & (split == 0)
    tl.store(high_out + group, high, mask=leads)
    tl.store(low_out + group, low, mask=leads)
    tl.store(rstd_out + group, rstd, mask=leads)
