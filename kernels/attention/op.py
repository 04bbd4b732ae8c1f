"""The public operation: checks the arguments and chooses the implementation."""

import torch
from torch import Tensor

from fastdiff.kernels.attention import pytorch, reference
from fastdiff.kernels.backend import HAS_TRITON, HAVE_AUTOCAST, Backend, choose, require

IMPLEMENTATIONS = {Backend.TORCH: pytorch.attention, Backend.REFERENCE: reference.attention}
if HAS_TRITON:
    from fastdiff.kernels.attention import kernel

    IMPLEMENTATIONS[Backend.TRITON] = kernel.Attention.apply

MOST_TOKENS = 4096
FASTEST_UP_TO = 1024
"""Most tokens at which the kernels are expected to be the fastest implementation."""
WIDE, WIDE_FASTEST_UP_TO = 96, 511
"""The head dimension from which this is expected only up to fewer tokens, and their number."""


def attention(qkv: Tensor, heads: int, *, backend: Backend | str = Backend.AUTO) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head, the softmax in fp32 (Vaswani et al. 2017, equation 1).

    qkv: (N, T, 3C) with any strides, packed as improved-diffusion packs it: heads outermost, then q, k and v of
    d = C / heads channels each. Returns (N, T, C), heads outermost; under autocast, in its dtype. The kernels support d
    from 16 to 256 in steps of 8, and up to 4096 tokens. ValueError if 3C is not a multiple of 3 * heads or the backend
    cannot run.
    """
    require(qkv.ndim == 3, "attention", "qkv must be (N, T, 3C), not {}", tuple(qkv.shape))
    fits = heads > 0 and qkv.shape[2] % (3 * heads) == 0
    require(fits, "attention", "{} channels of qkv do not divide into 3 * {} heads", qkv.shape[2], heads)
    qkv = _autocast(qkv)
    tokens, head_dim = qkv.shape[1], qkv.shape[2] // (3 * heads)
    run = choose(
        "attention",
        backend,
        IMPLEMENTATIONS,
        qkv,
        _refusal(tokens, head_dim),
        _kernels_win(tokens, head_dim, qkv.dtype),
    )
    return run(qkv, heads)


def _refusal(tokens: int, head_dim: int) -> str:
    """The reason why the kernels do not support these sizes, or an empty string."""
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"takes head dimensions from 16 to 256 in steps of 8, not {head_dim}"
    if tokens > MOST_TOKENS:
        return f"takes up to {MOST_TOKENS} tokens, not {tokens}"
    return ""


def _kernels_win(tokens: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are expected to be faster than the best SDPA with its split and concatenation.

    At 64 tokens an H200 took 1.3 to 1.5 times as long with the best SDPA, and 4 to 5 times backward. The rest is not
    measured yet: up to 256 tokens attention is memory-bound, and the packed gradient saves a concatenation; at 1024
    tokens Triton's tutorial kernel reaches 0.75 to 0.95 of FlashAttention-3, at more tokens less; at larger head
    dimensions it falls behind from 512 tokens on. In fp32 the kernels use no tensor cores.
    """
    return dtype is not torch.float32 and tokens <= (FASTEST_UP_TO if head_dim < WIDE else WIDE_FASTEST_UP_TO)


def _autocast(qkv: Tensor) -> Tensor:
    """Cast qkv to the dtype in which autocast would compute the products: once, instead of q, k and v one by one."""
    device = qkv.device.type
    if device in HAVE_AUTOCAST and torch.is_autocast_enabled(device) and qkv.dtype != torch.float64:
        return qkv.to(torch.get_autocast_dtype(device))
    return qkv
