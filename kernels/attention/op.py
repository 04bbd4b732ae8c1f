"""The public operation: arguments checked, implementation chosen."""

from torch import Tensor

from fastdiff.kernels.attention import pytorch, reference
from fastdiff.kernels.backend import Backend, choose, require

IMPLEMENTATIONS = {Backend.TORCH: pytorch.attention, Backend.REFERENCE: reference.attention}


def attention(qkv: Tensor, heads: int, *, backend: Backend | str = Backend.AUTO) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head, the softmax in fp32 (Vaswani et al. 2017, equation 1).

    qkv: (N, T, 3C) with any strides, packed as improved-diffusion packs it: heads outermost, then q, k and v of
    d = C / heads channels each. Returns (N, T, C), heads outermost. ValueError where 3C is no multiple of 3 * heads or
    the backend cannot run.
    """
    require(qkv.ndim == 3, "attention", "qkv must be (N, T, 3C), not {}", tuple(qkv.shape))
    fits = heads > 0 and qkv.shape[2] % (3 * heads) == 0
    require(fits, "attention", "{} channels of qkv do not divide into 3 * {} heads", qkv.shape[2], heads)
    return choose("attention", backend, IMPLEMENTATIONS, qkv)(qkv, heads)
