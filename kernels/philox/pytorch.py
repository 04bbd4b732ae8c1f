"""The generator in PyTorch; generator.py draws the same words."""

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox_uint32(seed: int, samples: Tensor, step: int | Tensor, elements: int) -> Tensor:
    """See op.py. ``step`` may be (N,) int64, one for each sample."""
    blocks = torch.arange(-(-elements // 4), device=samples.device)
    samples = samples[:, None]
    steps = step[:, None] if isinstance(step, Tensor) else torch.full_like(samples, step)
    c0 = blocks.expand(len(samples), -1)
    c1, c2, c3 = (part.expand_as(c0) for part in (steps, samples & WORD, samples >> 32))
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so that both words of the unsigned product are correct. The high words of c1
        # and c3 may hold anything, because they are masked before they are multiplied.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((odd >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(WORD), odd
        c2, c3 = ((even >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(WORD), even
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack([c0, c1, c2, c3], dim=-1).bitwise_and_(WORD).flatten(1)[:, :elements]


def philox_normal(seed: int, samples: Tensor, step: int | Tensor, elements: int) -> Tensor:
    """See op.py; (N, elements). ``step`` may be (N,) int64, one for each sample."""
    words = philox_uint32(seed, samples, step, -(-elements // 4) * 4)
    # a word with its sign bit set is folded onto the positive ones, then scaled to [0, 1)
    folded = torch.minimum(words, WORD - words)
    u1, u2 = (folded.to(torch.float32) * 4.6566127342e-10).unflatten(-1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp(min=1e-7)))
    angle = 2 * math.pi * u2
    # stacked along the last dimension, a CPU would copy them one by one
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1).transpose(1, 2).flatten(1)
    return normals[:, :elements]
