"""Functions that the programs of group_norm_silu share: their place in the tensor, tiles, and sums over groups."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastdiff.kernels.arithmetic import divide, exp, reciprocal

LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2))


class Strided(NamedTuple):
    """A tensor (N, C, pixels) or, with a step of 1 for its pixels, (N, C): its first value and its steps."""

    at: Any
    n: Any
    c: Any
    p: Any


class Joined(NamedTuple):
    """A tensor or none, or two whose channels follow each other, the second's from ``border`` on."""

    first: Any
    second: Any = None
    border: Any = None


@triton.jit
def place(channels, GROUPS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, REVERSED: tl.constexpr):
    """This program's sample, its channels (BLOCK_CHANNELS,), and the mask of those that exist."""
    blocks = tl.cdiv(channels, GROUPS * DEPTH)
    index = tl.program_id(0)
    if REVERSED:
        index = tl.num_programs(0) - 1 - index
    lane = tl.arange(0, BLOCK_CHANNELS)
    c = index % blocks * (GROUPS * DEPTH) + lane
    return (index // blocks).to(tl.int64), c, (lane < GROUPS * DEPTH) & (c < channels)


@triton.jit
def over_groups(values, GROUPS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The sum of ``values`` (BLOCK_CHANNELS,) over the channels of its group, for every channel."""
    PADDED_GROUPS: tl.constexpr = triton.next_power_of_2(GROUPS)
    PADDED_DEPTH: tl.constexpr = triton.next_power_of_2(DEPTH)
    if GROUPS == 1:
        return tl.zeros_like(values) + tl.sum(values, 0)
    elif DEPTH & (DEPTH - 1) == 0:
        by_group = tl.reshape(values, (BLOCK_CHANNELS // DEPTH, DEPTH))
        sums = tl.sum(by_group, 1)[:, None]
        return tl.reshape(tl.broadcast_to(sums, (BLOCK_CHANNELS // DEPTH, DEPTH)), (BLOCK_CHANNELS,))
    else:
        lane = tl.arange(0, PADDED_DEPTH)
        member = tl.arange(0, PADDED_GROUPS)[:, None] * DEPTH + lane[None, :]
        real = (lane < DEPTH)[None, :] & (member < BLOCK_CHANNELS)
        index = tl.reshape(tl.where(real, member, 0), (PADDED_GROUPS * PADDED_DEPTH,))
        by_group = tl.reshape(tl.gather(values, index, 0), (PADDED_GROUPS, PADDED_DEPTH))
        sums = tl.sum(tl.where(real, by_group, 0.0), 1)
        return tl.gather(sums, tl.minimum(tl.arange(0, BLOCK_CHANNELS) // DEPTH, PADDED_GROUPS - 1), 0)


@triton.jit
def pointers(x, n, c, at, p):
    """Pointers to a tile (channels, pixels) of sample n, whose first pixel is ``at``, from which ``p`` counts.

    Offsets in a sample have 32 bits: 64 would take three times the instructions. n has 64.
    """
    p += at
    if x.second is None:
        return x.first.at + n * x.first.n + (c[:, None] * x.first.c + p[None, :] * x.first.p)
    else:
        first, second = x.first.at + n * x.first.n, x.second.at + n * x.second.n
        row = tl.where(c < x.border, first + c * x.first.c, second + (c - x.border) * x.second.c)
        return row[:, None] + p[None, :] * tl.where(c < x.border, x.first.p, x.second.p)[:, None]


@triton.jit
def first_of_group(x, input_bias, n, c, real, DEPTH: tl.constexpr):
    """The first value of its group for every channel if x is fp32; 0 for other dtypes, which do not need it."""
    if x.first.at.dtype.element_ty == tl.float32:
        channel = c // DEPTH * DEPTH
        at = tl.reshape(pointers(x, n, channel, 0, tl.arange(0, 1)), channel.shape)
        first = tl.load(at, mask=real, other=0.0)
        if input_bias is not None:
            first += tl.load(input_bias + channel, mask=real, other=0.0).to(tl.float32)
        return first
    else:
        return tl.zeros_like(c).to(tl.float32)


@triton.jit
def negative(bias, c, real):
    """Minus the ``bias`` (C,) of the tile's channels in fp32; 0 without one, which costs nothing to subtract."""
    if bias is None:
        return tl.zeros(c.shape, tl.float32)
    else:
        return -tl.load(bias + c, mask=real, other=0.0).to(tl.float32)


@triton.jit
def ratio(a, b, EXACT: tl.constexpr):
    """a / b, correctly rounded only if EXACT (x is fp32), because that is a function call, which costs registers."""
    if EXACT:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def two_parts(first, mean):
    """``mean`` + ``first`` as an fp32 number and its rounding error (Knuth's two-sum)."""
    high = first + mean
    of_mean = high - first
    return high, (first - (high - of_mean)) + (mean - of_mean)


@triton.jit
def centred(x, high, low, EXACT: tl.constexpr):
    """A tile (channels, pixels) in fp32 minus the mean of its group in two parts."""
    x -= high[:, None]
    if EXACT:
        x -= low[:, None]
    return x


@triton.jit
def layer(weight, bias, scale, shift, n, c, real):
    """weight, bias, 1 + scale and shift, for every channel."""
    w = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    gain = tl.full(w.shape, 1.0, tl.float32)
    if scale is not None:
        gain += tl.load(scale.at + n * scale.n + c.to(tl.int64) * scale.c, mask=real, other=0.0).to(tl.float32)
    offset = tl.zeros_like(w)
    if shift is not None:
        offset = tl.load(shift.at + n * shift.n + c.to(tl.int64) * shift.c, mask=real, other=0.0).to(tl.float32)
    return w, b, gain, offset


@triton.jit
def inside(real, p, stop, EVEN: tl.constexpr):
    """Mask of a tile (channels, pixels), or (channels, 1) if the pixels are a multiple of the tile's."""
    if EVEN:
        return real[:, None]
    else:
        return real[:, None] & (p < stop)[None, :]


@triton.jit
def _one_and_exp(z):
    """1 + exp(-z), at most 2^126, so that its reciprocal is a normal number."""
    return tl.minimum(1.0 + exp(-z), 8.507059173023462e37, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exact_silu(z):
    """z * sigmoid(z) to about one rounding."""
    return divide(z, _one_and_exp(z))


@triton.jit
def exact_slope(z):
    """The derivative of silu at z."""
    s = reciprocal(_one_and_exp(z))
    return s * (z * (1.0 - s) + 1.0)


@triton.jit
def fast_silu(e):
    """z * sigmoid(z) from ``e`` = -z log2(e): its errors are hidden by a rounding to 16 bits.

    Squaring rsqrt takes three instructions fewer than a division, and the root can hold the factor log2(e).
    """
    root = tl.rsqrt(tl.exp2(e) * LOG2_E + LOG2_E)
    return e * root * (root * -1.0)  # -root would be subtracted from 0


@triton.jit
def fast_slope(e):
    """The derivative of silu, s * (z * (1 - s) + 1) with s = sigmoid(z), from ``e`` = -z log2(e), as fast_silu."""
    root = tl.rsqrt(1.0 + tl.exp2(e))
    s = root * root
    return s * (e * (s * LN_2 - LN_2) + 1.0)


@triton.jit
def read(x, n, c, at, p, mask, HINT: tl.constexpr):
    """Load a tile (channels, pixels) in fp32, 0 outside the mask; HINT is the cache's eviction policy."""
    return tl.load(pointers(x, n, c, at, p), mask=mask, other=0.0, eviction_policy=HINT).to(tl.float32)


@triton.jit
def write(y, value, n, c, at, p, mask):
    """Store a tile (channels, pixels), rounded to the dtype of y."""
    tl.store(pointers(y, n, c, at, p), value.to(y.first.at.dtype.element_ty), mask=mask)
