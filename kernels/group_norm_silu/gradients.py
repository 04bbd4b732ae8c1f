"""Functions that the kernels of the backward pass share: xhat and dz, their sums, and what the forward pass saved."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.group_norm_silu.tile import LOG2_E, centred, exact_slope, fast_slope, inside, layer, read


@triton.jit
def affine(weight, bias, scale, shift, n, c, real):
    """a and b of z = xhat * a + b, for every channel."""
    w, b, gain, offset = layer(weight, bias, scale, shift, n, c, real)
    return w * gain, b * gain + offset


@triton.jit
def point_and_dz(
    x,
    dy,
    n,
    c,
    at,
    p,
    mask,
    minus_bias,
    high,
    low,
    rstd,
    a,
    b,
    SILU: tl.constexpr,
    HINT: tl.constexpr,
    AS_READ: tl.constexpr,
):
    """A tile of u, from which xhat follows, and of dz = dy * silu'(z); outside the mask dz is 0.

    If x is fp32, u is xhat. Else multiplication by rstd is left to the factors of its uses: u is x + input bias - mean,
    or AS_READ x itself, whose rounding errors grow with the mean, but not beyond those of 16 bits.
    """
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    u = read(x, n, c, at, p, mask, HINT)
    dz = read(dy, n, c, at, p, mask, HINT)
    if EXACT:
        u = centred(u - minus_bias[:, None], high, low, EXACT) * rstd[:, None]
        if SILU:
            dz *= exact_slope(u * a[:, None] + b[:, None])
    else:
        factor = rstd * a
        if AS_READ:
            b -= (minus_bias + high) * factor
        else:
            u -= (minus_bias + high)[:, None]
        if SILU:
            dz *= fast_slope(u * (factor * -LOG2_E)[:, None] + (b * -LOG2_E)[:, None])
    return u, dz


@triton.jit
def gradient(u, dz, minus_bias, high, rstd, a, middle, slope, EXACT: tl.constexpr, AS_READ: tl.constexpr):
    """A tile of dx = rstd * (dz * a - (middle + xhat * slope)) from the results of ``point_and_dz``."""
    if EXACT:
        return rstd[:, None] * (dz * a[:, None] - (middle[:, None] + u * slope[:, None]))
    else:
        along = rstd * rstd * slope
        level = rstd * middle
        if AS_READ:
            level -= (minus_bias + high) * along
        return dz * (rstd * a)[:, None] - (u * along[:, None] + level[:, None])


@triton.jit
def sums(
    x,
    dy,
    n,
    c,
    real,
    minus_bias,
    high,
    low,
    rstd,
    a,
    b,
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
    sum_dz_u = tl.zeros((BLOCK_CHANNELS, BLOCK_PIXELS), tl.float32)
    for at in tl.range(start, stop, BLOCK_PIXELS, num_stages=STAGES):
        mask = inside(real, at + p, stop, EVEN)
        hint: tl.constexpr = "evict_last" if KEPT else ""
        u, dz = point_and_dz(x, dy, n, c, at, p, mask, minus_bias, high, low, rstd, a, b, SILU, hint, False)
        sum_dz += dz
        sum_dz_u += dz * u
    EXACT: tl.constexpr = x.first.at.dtype.element_ty == tl.float32
    return tl.sum(sum_dz, 1), of_xhat(tl.sum(sum_dz_u, 1), rstd, EXACT)


@triton.jit
def of_xhat(sum_dz_u, rstd, EXACT: tl.constexpr):
    """The sum of dz * xhat from that of dz * u, where u is x + input bias - mean unless EXACT."""
    return sum_dz_u if EXACT else sum_dz_u * rstd


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
