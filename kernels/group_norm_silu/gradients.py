"""Functions that the kernels of the backward pass share: xhat and dz, their sums, and what the forward pass saved."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.group_norm_silu.tile import centred, inside, layer, read, read_input, sigmoid


@triton.jit
def affine(weight, bias, scale, shift, n, c, real):
    """a and b of z = xhat * a + b, for every channel."""
    w, b, gain, offset = layer(weight, bias, scale, shift, n, c, real)
    return w * gain, b * gain + offset


@triton.jit
def xhat_and_dz(x, channel_bias, dy, high, low, rstd, a, b, c, p, mask, SILU: tl.constexpr, HINT: tl.constexpr):
    """A tile of xhat and of dz = dy * silu'(z); outside the mask dz is 0."""
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    xhat = centred(read_input(x, channel_bias, c, p, mask, HINT), high, low, EXACT) * rstd[:, None]
    dz = read(dy, c, p, mask, HINT)
    if SILU:
        z = xhat * a[:, None] + b[:, None]
        s = sigmoid(z, EXACT)
        dz *= s * (z * (1.0 - s) + 1.0)
    return xhat, dz


@triton.jit
def sums(
    x,
    channel_bias,
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
        xhat, dz = xhat_and_dz(x, channel_bias, dy, high, low, rstd, a, b, c, at + p, mask, SILU, hint)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
    return tl.sum(sum_dz, 1), tl.sum(sum_dz_xhat, 1)


@triton.jit
def write_sums(
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
    """Write the sums and the gradients of scale and shift, which follow from them."""
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
def saved(high, low, rstd, n, c, real, channels, DEPTH: tl.constexpr):
    """Mean in two parts and rstd of the group, for every channel."""
    group = n * (channels // DEPTH) + c // DEPTH
    return (
        tl.load(high + group, mask=real, other=0.0),
        tl.load(low + group, mask=real, other=0.0),
        tl.load(rstd + group, mask=real, other=0.0),
    )
