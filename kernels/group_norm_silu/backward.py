"""The backward pass: one launch, two if the pixels are split, and one more for the parameters (parameters.py)."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.group_norm_silu.tile import (
    centred,
    inside,
    layer,
    over_groups,
    place,
    ratio,
    read,
    sigmoid,
    write,
)


@triton.jit
def _affine(weight, bias, scale, shift, n, c, real, scale_n, scale_c, shift_n, shift_c):
    """a and b of z = xhat * a + b, for every channel."""
    w, b, gain, offset = layer(weight, bias, scale, shift, n, c, real, scale_n, scale_c, shift_n, shift_c)
    return w * gain, b * gain + offset


@triton.jit
def _xhat_and_dz(
    x, dy, high, low, rstd, a, b, c, p, x_c, x_p, dy_c, dy_p, mask, SILU: tl.constexpr, HINT: tl.constexpr
):
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    xhat = centred(read(x, c, p, x_c, x_p, mask, HINT), high, low, EXACT) * rstd[:, None]
    dz = read(dy, c, p, dy_c, dy_p, mask, HINT)
    if SILU:
        z = xhat * a[:, None] + b[:, None]
        s = sigmoid(z, EXACT)
        dz *= s * (z * (1.0 - s) + 1.0)
    return xhat, dz


@triton.jit
def _sums(
    x,
    dy,
    high,
    low,
    rstd,
    a,
    b,
    c,
    real,
    start,
    stop,
    x_c,
    x_p,
    dy_c,
    dy_p,
    SILU: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Sums of dz and of dz * xhat over the pixels from start to stop, for every channel."""
    p = tl.arange(0, BLOCK_PIXELS)
    sum_dz = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for at in tl.range(start, stop, BLOCK_PIXELS, num_stages=STAGES):
        mask = inside(real, at + p, stop, EVEN)
        hint: tl.constexpr = "evict_last" if KEPT else ""
        xhat, dz = _xhat_and_dz(x, dy, high, low, rstd, a, b, c, at + p, x_c, x_p, dy_c, dy_p, mask, SILU, hint)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    return tl.sum(sum_dz, 1), tl.sum(sum_dz_xhat, 1)


@triton.jit
def _write_sums(
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
    real,
    channels,
):
    at = n * channels + c
    tl.store(sum_dz_out + at, sum_dz, mask=real)
    tl.store(sum_dz_xhat_out + at, sum_dz_xhat, mask=real)
    if dscale is not None:
        w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
        tl.store(dscale + at, (w * sum_dz_xhat + b * sum_dz).to(dscale.dtype.element_ty), mask=real)
    if dshift is not None:
        tl.store(dshift + at, sum_dz.to(dshift.dtype.element_ty), mask=real)


@triton.jit
def _saved(high, low, rstd, n, c, real, channels, DEPTH: tl.constexpr):
    """Mean in two parts and rstd of the group, for every channel."""
    group = n * (channels // DEPTH) + c // DEPTH
    return (
        tl.load(high + group, mask=real, other=0.0),
        tl.load(low + group, mask=real, other=0.0),
        tl.load(rstd + group, mask=real, other=0.0),
    )


@triton.jit
def group_norm_silu_backward(
    x,
    dy,
    weight,
    bias,
    scale,
    shift,
    mean_high,
    mean_low,
    rstd,
    dx,
    sum_dz_out,
    sum_dz_xhat_out,
    dscale,
    dshift,
    channels,
    pixels,
    x_n,
    x_c,
    x_p,
    dy_n,
    dy_c,
    dy_p,
    dx_n,
    dx_c,
    dx_p,
    scale_n,
    scale_c,
    shift_n,
    shift_c,
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
    """dx, dscale, dshift, and the sums of dz and of dz * xhat over the pixels, fp32 (N, C).

    Grid: one program per sample and block of GROUPS groups of DEPTH channels.
    """
    n, c, real = place(channels, GROUPS, DEPTH, BLOCK_CHANNELS, False)
    x += n * x_n
    dy += n * dy_n
    dx += n * dx_n
    a, b = _affine(weight, bias, scale, shift, n, c, real, scale_n, scale_c, shift_n, shift_c)
    high, low, r = _saved(mean_high, mean_low, rstd, n, c, real, channels, DEPTH)
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    values = DEPTH * tl.cast(pixels, tl.float32)
    p = tl.arange(0, BLOCK_PIXELS)
    if ON_CHIP:
        mask = inside(real, p, pixels, EVEN)
        xhat, dz = _xhat_and_dz(x, dy, high, low, r, a, b, c, p, x_c, x_p, dy_c, dy_p, mask, SILU, "")
        sum_dz, sum_dz_xhat = tl.sum(dz, 1), tl.sum(dz * xhat, 1)
    else:
        sum_dz, sum_dz_xhat = _sums(
            x,
            dy,
            high,
            low,
            r,
            a,
            b,
            c,
            real,
            0,
            pixels,
            x_c,
            x_p,
            dy_c,
            dy_p,
            SILU,
            BLOCK_CHANNELS,
            BLOCK_PIXELS,
            EVEN,
            STAGES,
            KEPT,
        )
    _write_sums(sum_dz, sum_dz_xhat, weight, bias, sum_dz_out, sum_dz_xhat_out, dscale, dshift, n, c, real, channels)
    middle = ratio(over_groups(a * sum_dz, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    slope = ratio(over_groups(a * sum_dz_xhat, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    if ON_CHIP:
        value = r[:, None] * (dz * a[:, None] - (middle[:, None] + xhat * slope[:, None]))
        write(dx, value, c, p, dx_c, dx_p, mask)
    else:
        for done in tl.range(0, pixels, BLOCK_PIXELS, num_stages=STAGES):
            at = tl.cdiv(pixels, BLOCK_PIXELS) * BLOCK_PIXELS - BLOCK_PIXELS - done
            mask = inside(real, at + p, pixels, EVEN)
            hint: tl.constexpr = "evict_first" if KEPT else ""
            xhat, dz = _xhat_and_dz(x, dy, high, low, r, a, b, c, at + p, x_c, x_p, dy_c, dy_p, mask, SILU, hint)
            value = r[:, None] * (dz * a[:, None] - (middle[:, None] + xhat * slope[:, None]))
            write(dx, value, c, at + p, dx_c, dx_p, mask)


@triton.jit
def group_norm_silu_backward_sums(
    x,
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
    x_n,
    x_c,
    x_p,
    dy_n,
    dy_c,
    dy_p,
    scale_n,
    scale_c,
    shift_n,
    shift_c,
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
    x += n * x_n
    dy += n * dy_n
    a, b = _affine(weight, bias, scale, shift, n, c, real, scale_n, scale_c, shift_n, shift_c)
    high, low, r = _saved(mean_high, mean_low, rstd, n, c, real, channels, DEPTH)
    start = tl.program_id(1) * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    sum_dz, sum_dz_xhat = _sums(
        x,
        dy,
        high,
        low,
        r,
        a,
        b,
        c,
        real,
        start,
        stop,
        x_c,
        x_p,
        dy_c,
        dy_p,
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
    dx,
    sum_dz_out,
    sum_dz_xhat_out,
    dscale,
    dshift,
    channels,
    pixels,
    pixels_per_split,
    x_n,
    x_c,
    x_p,
    dy_n,
    dy_c,
    dy_p,
    dx_n,
    dx_c,
    dx_p,
    scale_n,
    scale_c,
    shift_n,
    shift_c,
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
    x += n * x_n
    dy += n * dy_n
    dx += n * dx_n
    a, b = _affine(weight, bias, scale, shift, n, c, real, scale_n, scale_c, shift_n, shift_c)
    high, low, r = _saved(mean_high, mean_low, rstd, n, c, real, channels, DEPTH)

    s = tl.arange(0, BLOCK_SPLITS)
    present = (s < splits)[:, None] & real[None, :]
    partial = (n * splits + s[:, None]) * channels + c[None, :]
    sum_dz = tl.sum(tl.load(partial_dz + partial, mask=present, other=0.0), 0)
    sum_dz_xhat = tl.sum(tl.load(partial_dz_xhat + partial, mask=present, other=0.0), 0)
    _write_sums(
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

    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    values = DEPTH * tl.cast(pixels, tl.float32)
    middle = ratio(over_groups(a * sum_dz, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    slope = ratio(over_groups(a * sum_dz_xhat, GROUPS, DEPTH, BLOCK_CHANNELS), values, EXACT)
    p = tl.arange(0, BLOCK_PIXELS)
    start = split * pixels_per_split
    stop = tl.minimum(start + pixels_per_split, pixels)
    for at in tl.range(start, stop, BLOCK_PIXELS, num_stages=STAGES):
        mask = inside(real, at + p, stop, EVEN)
        hint: tl.constexpr = "evict_first" if KEPT else ""
        xhat, dz = _xhat_and_dz(x, dy, high, low, r, a, b, c, at + p, x_c, x_p, dy_c, dy_p, mask, SILU, hint)
        value = r[:, None] * (dz * a[:, None] - (middle[:, None] + xhat * slope[:, None]))
        write(dx, value, c, at + p, dx_c, dx_p, mask)
