"""The backward pass writes dq, dk and dv of every head into one packed (N, T, 3C) tensor.

With P = softmax(S), S = q k^T / sqrt(d), dP = dy v^T and delta the row sums of P * dP, which equal those of dy * y:

    dv = P^T dy,  dS = P * (dP - delta),  dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d).

Kernels that compute dk and dv hold the scores as (keys, queries). P^T and dS^T are then left factors, which tensor
cores read from registers. P and dS are rounded to the input's dtype for products; softmax, delta and sums are fp32.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.attention.tiles import (
    add_weighted,
    inner,
    inverse,
    load,
    load_lse,
    power_of_two,
    queries_keys_values,
    row_products,
    sample_and_head,
    softmax_again,
    store,
    times,
    weighted_by_columns,
    zeros,
)


@triton.jit
def _softmax_over_keys(s, keys, T, EVEN: tl.constexpr, EXACT: tl.constexpr):
    """Softmax over the keys of scores / ln 2, (keys, queries). Keys from T on get zero weight."""
    if not EVEN:
        s = tl.where((keys < T)[:, None], s, float("-inf"))
    p = power_of_two(s - tl.max(s, 0)[None, :], EXACT)
    return p * inverse(tl.sum(p, 0), EXACT)[None, :]


@triton.jit
def attention_backward_at_once(
    dy,
    qkv,
    dqkv,
    dy_n,
    dy_t,
    dy_c,
    qkv_n,
    qkv_t,
    qkv_c,
    T,
    heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    TOKENS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A complete head in one tile of TOKENS tokens, one program per sample and head.

    Every result is stored as soon as it is computed, because the registers only hold the scores, their gradient and one
    of dq, dk, dv.
    """
    n, h = sample_and_head(tl.program_id(0), heads)
    q_base, k_base, v_base = queries_keys_values(qkv, n, h, qkv_n, qkv_c, D)
    C = heads * D
    dq_base = dqkv + n * T * (3 * C) + 3 * h * D
    tokens = tl.arange(0, TOKENS)
    k = load(k_base, tokens, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    q = load(q_base, tokens, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    v = load(v_base, tokens, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    do = load(dy + n * dy_n + h * D * dy_c, tokens, dy_t, dy_c, T, D, D1, D2, EVEN)
    EXACT: tl.constexpr = qkv.dtype.element_ty == tl.float32
    p = _softmax_over_keys(inner(k, q) * scale_log2, tokens, T, EVEN, EXACT)  # (keys, queries)
    dv = add_weighted(zeros(TOKENS, D1, D2), p, do)
    dp = inner(v, do)
    store(dq_base + 2 * D, dv, tokens, 3 * C, T, D, EVEN)
    ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q[0].dtype)
    dk = add_weighted(zeros(TOKENS, D1, D2), ds, q)
    store(dq_base + D, times(dk, scale), tokens, 3 * C, T, D, EVEN)
    store(dq_base, times(weighted_by_columns(ds, k), scale), tokens, 3 * C, T, D, EVEN)


@triton.jit
def attention_backward_queries(
    dy,
    qkv,
    y,
    lse,
    delta,
    dqkv,
    dy_n,
    dy_t,
    dy_c,
    qkv_n,
    qkv_t,
    qkv_c,
    T,
    heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dq of a block of queries, in a loop over blocks of keys, and delta of these queries, fp32 (N, heads, T).

    One program per sample, head and block of queries; P = 2^(s / ln 2 - lse) (Dao et al. 2022, algorithm 4).
    """
    blocks = tl.cdiv(T, QUERIES)
    n, h = sample_and_head(tl.program_id(0) // blocks, heads)
    q_base, k_base, v_base = queries_keys_values(qkv, n, h, qkv_n, qkv_c, D)
    C = heads * D
    rows = tl.program_id(0) % blocks * QUERIES + tl.arange(0, QUERIES)
    keys = tl.arange(0, KEYS)
    do = load(dy + n * dy_n + h * D * dy_c, rows, dy_t, dy_c, T, D, D1, D2, EVEN)
    row_delta = row_products(do, load(y + n * T * C + h * D, rows, C, 1, T, D, D1, D2, EVEN))
    of_row = (n * heads + h) * T + rows
    tl.store(delta + of_row, row_delta, mask=rows < T)
    row_lse = load_lse(lse, n * heads + h, rows, T, qkv.dtype.element_ty == tl.float32)
    q = load(q_base, rows, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    dq = zeros(QUERIES, D1, D2)
    for start in range(0, T, KEYS):
        k = load(k_base, start + keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
        v = load(v_base, start + keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
        s = inner(q, k) * scale_log2  # (QUERIES, KEYS)
        if not EVEN:
            s = tl.where((start + keys < T)[None, :], s, float("-inf"))
        p = softmax_again(s, row_lse, 1)
        dq = add_weighted(dq, p * (inner(do, v) - row_delta[:, None]), k)
    store(dqkv + n * T * (3 * C) + 3 * h * D, times(dq, scale), rows, 3 * C, T, D, EVEN)


@triton.jit
def attention_backward_keys(
    dy,
    qkv,
    lse,
    delta,
    dqkv,
    dy_n,
    dy_t,
    dy_c,
    qkv_n,
    qkv_t,
    qkv_c,
    T,
    heads,
    scale,
    scale_log2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dk and dv of a block of keys, in a loop over blocks of queries. Runs after attention_backward_queries.

    One program per sample, head and block of keys. Queries from T on are zero and add zero.
    """
    blocks = tl.cdiv(T, KEYS)
    n, h = sample_and_head(tl.program_id(0) // blocks, heads)
    q_base, k_base, v_base = queries_keys_values(qkv, n, h, qkv_n, qkv_c, D)
    C = heads * D
    keys = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    k = load(k_base, keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    v = load(v_base, keys, qkv_t, qkv_c, T, D, D1, D2, EVEN)
    dk = zeros(KEYS, D1, D2)
    dv = zeros(KEYS, D1, D2)
    for start in range(0, T, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        q = load(q_base, rows, qkv_t, qkv_c, T, D, D1, D2, EVEN)
        do = load(dy + n * dy_n + h * D * dy_c, rows, dy_t, dy_c, T, D, D1, D2, EVEN)
        of_row = (n * heads + h) * T + rows
        row_lse = load_lse(lse, n * heads + h, rows, T, qkv.dtype.element_ty == tl.float32)
        row_delta = tl.load(delta + of_row, mask=rows < T, other=0.0)
        # in fp32, compute the scores as the forward pass does: the softmax cancels equal rounding errors
        s = tl.trans(inner(q, k)) if qkv.dtype.element_ty == tl.float32 else inner(k, q)  # (KEYS, QUERIES)
        s *= scale_log2
        if not EVEN:
            s = tl.where((keys < T)[:, None], s, float("-inf"))
        p = softmax_again(s, row_lse, 0)
        dv = add_weighted(dv, p, do)
        dk = add_weighted(dk, p * (inner(v, do) - row_delta[None, :]), q)
    dk_base = dqkv + n * T * (3 * C) + (3 * h + 1) * D
    store(dk_base, times(dk, scale), keys, 3 * C, T, D, EVEN)
    store(dk_base + D, dv, keys, 3 * C, T, D, EVEN)
