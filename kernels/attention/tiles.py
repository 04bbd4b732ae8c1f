"""Functions that the attention kernels share: addresses of a head, its tiles and their products.

A head dimension that is not a power of two is split into two that are, 144 into 128 + 16, instead of padded to the next
one. A tile is a tuple of one or two blocks (rows, channels). D1 and D2 are their widths; D2 = 0 if there is one block.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.arithmetic import exp2, reciprocal


@triton.jit
def sample_and_head(index, heads):
    """Both in int64, because offsets in large tensors are products of them."""
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64)


@triton.jit
def queries_keys_values(qkv, n, h, stride_n, stride_c, D: tl.constexpr):
    """Pointers to the start of q, k and v of a head in the packed tensor."""
    sample = qkv + n * stride_n
    return sample + 3 * h * D * stride_c, sample + (3 * h + 1) * D * stride_c, sample + (3 * h + 2) * D * stride_c


@triton.jit
def _pointers(base, rows, stride_t, stride_c, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    channels = FIRST + tl.arange(0, WIDTH)
    return base + (rows.to(tl.int64)[:, None] * stride_t + channels.to(tl.int64)[None, :] * stride_c)


@triton.jit
def _mask(rows, T, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Mask of the elements that exist; None if all do."""
    channels = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH <= D:
        mask = None if EVEN else (rows < T)[:, None]
    else:
        mask = (channels < D)[None, :] if EVEN else (rows < T)[:, None] & (channels < D)[None, :]
    return mask


@triton.jit
def _load_part(
    base, rows, stride_t, stride_c, T, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr
):
    pointers = _pointers(base, rows, stride_t, stride_c, FIRST, WIDTH)
    mask = _mask(rows, T, D, FIRST, WIDTH, EVEN)
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load(base, rows, stride_t, stride_c, T, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, EVEN: tl.constexpr):
    """Load a tile of one head, zero outside it. EVEN: all rows are below T."""
    first = _load_part(base, rows, stride_t, stride_c, T, D, 0, D1, EVEN)
    return (first, _load_part(base, rows, stride_t, stride_c, T, D, D1, D2, EVEN)) if D2 else (first,)


@triton.jit
def _store_part(base, block, rows, stride_t, T, D: tl.constexpr, FIRST: tl.constexpr, EVEN: tl.constexpr):
    pointers = _pointers(base, rows, stride_t, 1, FIRST, block.shape[1])
    tl.store(pointers, block.to(base.dtype.element_ty), mask=_mask(rows, T, D, FIRST, block.shape[1], EVEN))


@triton.jit
def store(base, tile, rows, stride_t, T, D: tl.constexpr, EVEN: tl.constexpr):
    """Store a tile, rounded to the output's dtype, in adjacent channels."""
    _store_part(base, tile[0], rows, stride_t, T, D, 0, EVEN)
    if len(tile) == 2:
        _store_part(base, tile[1], rows, stride_t, T, D, tile[0].shape[1], EVEN)


@triton.jit
def power_of_two(x, EXACT: tl.constexpr):
    """2^x; EXACT, for fp32 inputs, to one rounding instead of two."""
    return exp2(x) if EXACT else tl.exp2(x)


@triton.jit
def inverse(x, EXACT: tl.constexpr):
    """1 / x; EXACT, for fp32 inputs, to one rounding instead of two."""
    return reciprocal(x) if EXACT else 1.0 / x


@triton.jit
def store_lse(base, highest, total, head, rows, T, APART: tl.constexpr):
    """Store the log2 of each row's sum of exponentials or, if APART, its maximum and the inverse of the remaining sum.

    In fp32 adding the two would lose digits that the backward pass needs; in 16 bits the loss is invisible.
    """
    if APART:
        pointers = base + head * (2 * T) + rows
        tl.store(pointers, highest, mask=rows < T)
        tl.store(pointers + T, reciprocal(total), mask=rows < T)
    else:
        tl.store(base + head * T + rows, highest + tl.log2(total), mask=rows < T)


@triton.jit
def load_lse(base, head, rows, T, APART: tl.constexpr):
    """Load what store_lse wrote, as a tuple."""
    pointers = base + head * (2 * T if APART else T) + rows
    first = tl.load(pointers, mask=rows < T, other=0.0)
    return (first, tl.load(pointers + T, mask=rows < T, other=0.0)) if APART else (first,)


@triton.jit
def softmax_again(s, lse, AXIS: tl.constexpr):
    """The softmax weights of scores / ln 2 with the keys along AXIS."""
    APART: tl.constexpr = len(lse) == 2
    p = power_of_two(s - tl.expand_dims(lse[0], AXIS), APART)
    return p * tl.expand_dims(lse[1], AXIS) if APART else p


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """A zero tile to accumulate in."""
    first = tl.zeros([ROWS, D1], tl.float32)
    return (first, tl.zeros([ROWS, D2], tl.float32)) if D2 else (first,)


@triton.jit
def times(tile, factor):
    """The tile times a scalar or a column (rows, 1)."""
    return (tile[0] * factor, tile[1] * factor) if len(tile) == 2 else (tile[0] * factor,)


@triton.jit
def _plus(a, product):
    """a + product, a result of tl.dot. Of + the compiler makes tl.dot(..., a): one chain of fma, as long as both."""
    return tl.fma(product, 1.0, a)


@triton.jit
def inner(a, b):
    """a b^T: every row of a with every row of b, in fp32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        if a[0].dtype == tl.float32:
            product = _plus(product, tl.dot(a[1], tl.trans(b[1]), input_precision="ieee"))
        else:
            product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")
    return product


@triton.jit
def add_weighted(total, weights, tile):
    """total + weights @ tile in fp32, with the weights rounded to the tile's dtype."""
    w = weights.to(tile[0].dtype)
    first = tl.dot(w, tile[0], total[0], input_precision="ieee")
    return (first, tl.dot(w, tile[1], total[1], input_precision="ieee")) if len(total) == 2 else (first,)


@triton.jit
def _transposed_product(weights, part):
    if weights.shape[1] < 64:  # Hopper's tensor cores need 64 rows: here the channels become the rows
        product = tl.trans(tl.dot(tl.trans(part), weights, input_precision="ieee"))
    else:
        product = tl.dot(tl.trans(weights), part, input_precision="ieee")
    return product


@triton.jit
def weighted_by_columns(weights, tile):
    """weights^T @ tile in fp32, for weights (rows of the tile, others) in the tile's dtype."""
    first = _transposed_product(weights, tile[0])
    return (first, _transposed_product(weights, tile[1])) if len(tile) == 2 else (first,)


@triton.jit
def row_products(a, b):
    """The sum of a * b over the channels of each row, in fp32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total
