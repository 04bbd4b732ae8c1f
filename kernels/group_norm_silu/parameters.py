"""The gradients of weight and biases: sums over the batch of what the backward pass leaves, in a launch of its own."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def group_norm_silu_backward_parameters(
    sum_dz,
    sum_dz_xhat,
    sum_dx,
    scale,
    dweight,
    dbias,
    dinput_bias,
    samples,
    splits,
    channels,
    BLOCK_SAMPLES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """dweight = sum_n (1 + scale) * sum dz * xhat, dbias = sum_n (1 + scale) * sum dz, dinput_bias = sum_n sum dx.

    The sums of dx are those of each split of the pixels. Grid: blocks of channels.
    """
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    dw = tl.zeros((BLOCK_SAMPLES, BLOCK_CHANNELS), tl.float32)
    db = tl.zeros((BLOCK_SAMPLES, BLOCK_CHANNELS), tl.float32)
    for at in range(0, samples, BLOCK_SAMPLES):
        n = at + tl.arange(0, BLOCK_SAMPLES).to(tl.int64)
        mask = (n < samples)[:, None] & (c < channels)[None, :]
        offset = n[:, None] * channels + c[None, :]
        of_dz = tl.load(sum_dz + offset, mask=mask, other=0.0)
        of_dz_xhat = tl.load(sum_dz_xhat + offset, mask=mask, other=0.0)
        if scale is not None:
            pointers = scale.at + n[:, None] * scale.n + c.to(tl.int64)[None, :] * scale.c
            gain = 1.0 + tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            of_dz *= gain
            of_dz_xhat *= gain
        dw += of_dz_xhat
        db += of_dz
    tl.store(dweight + c, tl.sum(dw, 0).to(dweight.dtype.element_ty), mask=c < channels)
    tl.store(dbias + c, tl.sum(db, 0).to(dbias.dtype.element_ty), mask=c < channels)
    if sum_dx is not None:
        di = tl.zeros((BLOCK_SAMPLES, BLOCK_CHANNELS), tl.float32)
        for at in range(0, samples * splits, BLOCK_SAMPLES):
            row = at + tl.arange(0, BLOCK_SAMPLES).to(tl.int64)
            mask = (row < samples * splits)[:, None] & (c < channels)[None, :]
            di += tl.load(sum_dx + row[:, None] * channels + c[None, :], mask=mask, other=0.0)
        tl.store(dinput_bias + c, tl.sum(di, 0).to(dinput_bias.dtype.element_ty), mask=c < channels)
