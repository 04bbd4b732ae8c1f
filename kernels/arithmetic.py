"""fp32 functions to about one unit in the last place (ulp) on every GPU.

CUDA documents errors of 2 ulp for the instructions that tl.exp2 and / compile to; that of tl.exp grows with the
argument. The error budgets of fp32 results have no room for this. Results in 16 bits hide it.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def _exp_near_zero(r):
    """e^r for r up to ln 2 / 2 on either side, by the polynomial of Moshier's Cephes."""
    p = 4.1665795894e-2 + r * (8.3334519073e-3 + r * (1.3981999507e-3 + r * 1.9875691500e-4))
    return 1.0 + (r + r * r * (5.0000001201e-1 + r * (1.6666665459e-1 + r * p)))


@triton.jit
def exp(x):
    """e^x to 1.02 ulp where that is a normal number; infinite from about 88.4 on.

    tl.exp is 2 to the power of the rounded x log2 e.
    """
    x = tl.clamp(x, -104.0, 89.0, propagate_nan=tl.PropagateNan.ALL)  # the results include 0 and infinity
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693359375) + k * 2.12194440e-4  # x - k ln 2; the first product is exact
    return _exp_near_zero(r) * tl.exp2(k)


@triton.jit
def exp2(x):
    """2^x to 1.02 ulp where that is a normal number; infinite from 127.5 on. tl.exp2 is exact for integers only."""
    x = tl.clamp(x, -150.0, 128.0, propagate_nan=tl.PropagateNan.ALL)
    k = tl.floor(x + 0.5)
    return _exp_near_zero((x - k) * 0.6931471805599453) * tl.exp2(k)


@triton.jit
def log(x):
    """The natural logarithm of a positive normal x to 0.84 ulp (Moshier's Cephes)."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that x / 2^exponent is from sqrt(1 / 2) to sqrt(2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = 1.1676998740e-1 + f * (-1.1514610310e-1 + f * 7.0376836292e-2)
    p = 1.4249322787e-1 + f * (-1.2420140846e-1 + f * p)
    p = -2.4999993993e-1 + f * (2.0000714765e-1 + f * (-1.6668057665e-1 + f * p))
    rest = f * f * f * (3.3333331174e-1 + f * p) - e * 2.12194440e-4 - 0.5 * f * f
    y = (f + rest) + e * 0.693359375
    return tl.where(x != x, x, y)


@triton.jit
def divide(a, b):
    """a / b to one rounding for numbers, and a quotient, far from fp32's limits.

    tl.div_rn handles these in a call, which costs a tile's program twice the registers, or a stack.
    """
    r = 1.0 / b
    q = a * r
    return tl.fma(tl.fma(-b, q, a), r, q)


@triton.jit
def reciprocal_by_root(x):
    """1 / x to one rounding for a positive x far from fp32's limits, in fewer instructions than ``reciprocal``."""
    root = tl.rsqrt(x)
    r = root * root
    return tl.fma(tl.fma(-x, r, 1.0), r, r)


@triton.jit
def reciprocal(x):
    """1 / x to one rounding for x far from fp32's limits, see ``divide``."""
    r = 1.0 / x
    return tl.fma(tl.fma(-x, r, 1.0), r, r)
