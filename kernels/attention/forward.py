"""The forward pass: y = softmax(q k^T / sqrt(d)) v, one program per sample, head and block of queries.

Exponentials are powers of two of scores / ln 2. Weights stay unnormalised, at most 1, until the end. They are rounded
to the input's dtype for the product with v; sums, maxima and products are fp32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.attention.tiles import (
    add_weighted,
    inner,
    inverse,
    load,
    power_of_two,
    queries_keys_values,
    sample_and_head,
    store,
    store_lse,
    times,
    zeros,
)


@triton.jit
def attention_forward(
    qkv,
    y,
    lse,
    qkv_n,
    qkv_t,
    qkv_c,
    T,
    heads,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SAVE_LSE: tl.constexpr,
):
    """y (N, T, C) contiguous, and lse = log2 sum_j 2^(s_j / ln 2) of each query's scores s, fp32 (N, heads, T).

    For fp32 inputs lse is two numbers, (N, heads, 2, T), see store_lse. AT_ONCE: all keys are one tile. Otherwise the
    kernel loops over blocks of keys and rescales the running sums when the maximum grows (Milakov & Gimelshein 2018;
    Dao 2023).
    """
    EXACT: tl.constexpr = qkv.dtype.element_ty == tl.float32
    blocks = tl.cdiv(T, QUERIES)
    n, h = sample_and_head(tl.program_id(0) // blocks, heads)
    q_base, k_base, v_base = queries_keys_values(qkv, n, h, qkv_n, qkv_c, D)
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    keys = tl.arange(0, KEYS)
    q = load(q_base, rows, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    if AT_ONCE:
        k = load(k_base, keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
        v = load(v_base, keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
        s = inner(q, k) * scale_log2  # (QUERIES, KEYS)
        if not EVEN:
            s = tl.where((keys < T)[None, :], s, float("-inf"))
        highest = tl.max(s, 1)
        p = power_of_two(s - highest[:, None], EXACT)
        total = tl.sum(p, 1)
        o = add_weighted(zeros(QUERIES, D1, D2), p, v)
    else:
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        o = zeros(QUERIES, D1, D2)
        for start in range(0, T, KEYS):
            k = load(k_base, start + keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
            s = inner(q, k) * scale_log2
            if not EVEN:
                s = tl.where((start + keys < T)[None, :], s, float("-inf"))
            higher = tl.maximum(highest, tl.max(s, 1))
            p = power_of_two(s - higher[:, None], EXACT)
            shrinkage = power_of_two(highest - higher, EXACT)
            total = total * shrinkage + tl.sum(p, 1)
            v = load(v_base, start + keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
            o = add_weighted(times(o, shrinkage[:, None]), p, v)
            highest = higher
    C = heads * D
    store(y + n * T * C + h * D, times(o, inverse(total, EXACT)[:, None]), rows, C, T, D, EVEN)
    if SAVE_LSE:
        store_lse(lse, highest, total, n * heads + h, rows, T, EXACT)
