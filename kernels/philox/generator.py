"""The generator in Triton; pytorch.py draws the same words."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl
from triton.language.random import philox, uint_to_uniform_float

from fastdiff.kernels.arithmetic import log


@triton.jit
def draw_words(seed, sample, step, quads):
    """The four words of the counters (quad, step, sample low, sample high), each of the shape of ``quads``."""
    first = quads.to(tl.uint32)
    zero = first * 0
    low, high = (sample & 0xFFFFFFFF).to(tl.uint32), ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return philox(seed, first, zero + step.to(tl.uint32), zero + low, zero + high)


@triton.jit
def cos_sin(angle):
    """Cosine and sine for angles in [0, 2 pi], each to a rounding or two.

    tl.cos and tl.sin include a path for huge angles, which takes 28 bytes of stack each and is never needed here.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)  # quarters of a circle
    # pi / 2 in three parts, the first two so short that their products are exact (Cody & Waite 1980)
    r = ((angle - turns * 1.5703125) - turns * 4.837512969970703e-4) - turns * 7.54978995489188e-8
    rr = r * r  # within pi / 4; polynomials of Moshier's Cephes
    cosine = 1.0 - 0.5 * rr + rr * rr * (4.166664568e-2 + rr * (-1.388731625e-3 + rr * 2.443315711e-5))
    sine = r + r * rr * (-1.6666654611e-1 + rr * (8.3321608736e-3 - rr * 1.9515295891e-4))
    quarter = turns.to(tl.int32)
    swapped = (quarter & 1) == 1
    c, s = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -c, c), tl.where((quarter & 2) == 2, -s, s)


@triton.jit
def pair_of_normals(word1, word2):
    """Two normals from two words (Box & Muller 1958)."""
    u1, u2 = uint_to_uniform_float(word1), uint_to_uniform_float(word2)
    radius = tl.sqrt(-2.0 * log(tl.maximum(u1, 1e-7)))
    cosine, sine = cos_sin(6.283185307179586 * u2)
    return radius * cosine, radius * sine


@triton.jit
def draw_normals(seed, sample, step, quads):
    """The four normals from the words of the same counters."""
    w0, w1, w2, w3 = draw_words(seed, sample, step, quads)
    z0, z1 = pair_of_normals(w0, w1)
    z2, z3 = pair_of_normals(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def in_a_row(a0, a1, a2, a3):
    """Interleave four (Q,) tensors into (4Q,): the four values of each quad become adjacent."""
    pairs = tl.join(tl.join(a0, a2), tl.join(a1, a3))  # (Q, 2, 2); the last index is the low bit of the position
    return tl.reshape(pairs, (4 * a0.shape[0],))


@triton.jit(do_not_specialize=["seed", "step"])
def philox_draw(
    out, samples, seed: tl.int64, step: tl.int64, elements, sample_stride, blocks, NORMAL: tl.constexpr, Q: tl.constexpr
):
    """out[n, i] = word or normal number i of sample n;  out: (N, elements); one program per (n, 4 Q elements)."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * Q
    sample = tl.load(samples + n * sample_stride)
    quads = start + tl.arange(0, Q)
    if NORMAL:
        z0, z1, z2, z3 = draw_normals(seed, sample, step, quads)
        numbers = in_a_row(z0, z1, z2, z3)
    else:
        w0, w1, w2, w3 = draw_words(seed, sample, step, quads)
        numbers = in_a_row(w0, w1, w2, w3).to(tl.int64)
    i = 4 * start + tl.arange(0, 4 * Q)
    tl.store(out + n * elements + i, numbers, mask=i < elements)
