"""The objectives in one pass, with a second launch if a sample is split among programs."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastdiff.kernels.diffusion_loss.tile import terms, tile_of
from fastdiff.kernels.gaussian.kernel import LOSS_WEIGHT, WIDTH


@triton.jit
def quotient(total, by):
    """fp64 total / fp32 ``by`` to 40 bits. An fp64 division would be a function call with its own stack."""
    inverse = tl.cast(1.0 / by, tl.float64)
    return total * (inverse * (2.0 - tl.cast(by, tl.float64) * inverse))  # one Newton step


@triton.jit
def write_losses(
    mse, vb, loss, row, n, squares, bits, per_mse, per_vb, loss_of_vb, MSE: tl.constexpr, VB: tl.constexpr
):
    """Store mse, vb and loss of a sample from its sums."""
    total = 0.0
    if MSE:
        mean = quotient(squares, per_mse).to(tl.float32)
        total += tl.load(row + LOSS_WEIGHT) * mean
        tl.store(mse + n, mean)
    if VB:
        term = quotient(bits, per_vb).to(tl.float32)
        total += loss_of_vb * term
        tl.store(vb + n, term)
    tl.store(loss + n, total)


@triton.jit
def diffusion_loss_forward(
    mse,
    vb,
    loss,
    partial,
    output,
    x_start,
    x_t,
    noise,
    t,
    tables,
    per_mse,
    per_vb,
    loss_of_vb,
    pixels,
    tiles,
    per_split,
    output_n,
    output_c,
    output_p,
    x_start_n,
    x_start_c,
    x_start_p,
    x_t_n,
    x_t_c,
    x_t_p,
    noise_n,
    noise_c,
    noise_p,
    t_n,
    CHANNELS: tl.constexpr,
    MEAN_TYPE: tl.constexpr,
    VAR_TYPE: tl.constexpr,
    MSE: tl.constexpr,
    VB: tl.constexpr,
    SPLITS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """mse = sum (output - target)^2 / per_mse,  vb = sum bound / per_vb,  loss = weight mse + loss_of_vb vb

    All tensors are (N, C, pixels) with any strides. One program per (sample, split) sums per_split tiles of P pixels by
    C channels, in fp32 within a thread and in fp64 across threads. Several splits store theirs in ``partial``
    (2, N, SPLITS).
    """
    n = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    step = tl.load(t + n * t_n)
    row = tables + step * WIDTH
    squares = tl.zeros((P, C), tl.float32)
    bits = tl.zeros((P, C), tl.float32)
    for index in range(split * per_split, min(tiles, (split + 1) * per_split)):
        p, c, mask = tile_of(index, pixels, CHANNELS, P, C)
        difference, bit, _, _ = terms(
            output,
            x_start,
            x_t,
            noise,
            row,
            step,
            n,
            p,
            c,
            mask,
            output_n,
            output_c,
            output_p,
            x_start_n,
            x_start_c,
            x_start_p,
            x_t_n,
            x_t_c,
            x_t_p,
            noise_n,
            noise_c,
            noise_p,
            CHANNELS,
            MEAN_TYPE,
            VAR_TYPE,
            MSE,
            VB,
        )
        squares += difference * difference  # 0 outside the mask, where both were loaded as 0
        bits += tl.where(mask, bit, 0.0)
    # the few per-thread sums in fp64: this costs nothing, and only the elements' rounding errors remain
    squares = tl.sum(squares.to(tl.float64))
    bits = tl.sum(bits.to(tl.float64))
    if SPLITS == 1:
        write_losses(mse, vb, loss, row, n, squares, bits, per_mse, per_vb, loss_of_vb, MSE, VB)
    else:
        programs = tl.num_programs(0).to(tl.int64)
        tl.store(partial + tl.program_id(0), squares.to(tl.float32))
        tl.store(partial + programs + tl.program_id(0), bits.to(tl.float32))


@triton.jit
def diffusion_loss_finish(
    mse,
    vb,
    loss,
    partial,
    t,
    tables,
    per_mse,
    per_vb,
    loss_of_vb,
    t_n,
    MSE: tl.constexpr,
    VB: tl.constexpr,
    SPLITS: tl.constexpr,
    S: tl.constexpr,
):
    """Sum over a sample's splits;  partial: (2, N, SPLITS) fp32; one program per sample."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, S)
    at = partial + n * SPLITS + split
    further = at + tl.num_programs(0).to(tl.int64) * SPLITS
    squares = tl.sum(tl.load(at, mask=split < SPLITS, other=0.0).to(tl.float64), 0)
    bits = tl.sum(tl.load(further, mask=split < SPLITS, other=0.0).to(tl.float64), 0)
    row = tables + tl.load(t + n * t_n) * WIDTH
    write_losses(mse, vb, loss, row, n, squares, bits, per_mse, per_vb, loss_of_vb, MSE, VB)
