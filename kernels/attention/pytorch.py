"""Attention with the fastest operations of stock PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_PRODUCTS_UP_TO = 1024
"""Longest sequence whose (T, T) scores are materialised on a CPU."""


def attention(qkv: Tensor, heads: int) -> Tensor:
    """See op.py. Queries, keys and values are strided views of the packed tensor; no input is copied."""
    n, t, width = qkv.shape
    d = width // (3 * heads)
    q, k, v = qkv.view(n, t, heads, 3, d).permute(3, 0, 2, 1, 4).unbind(0)  # (N, H, T, D) each
    if qkv.device.type == "cpu" and t <= CPU_PRODUCTS_UP_TO:
        # PyTorch's flash attention for CPUs takes about three times as long, mostly in the backward pass
        scores = torch.matmul(q * d**-0.5, k.transpose(-1, -2))  # (N, H, T, T)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        attended = torch.matmul(weights, v)
    else:
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended.transpose(1, 2).reshape(n, t, heads * d)
