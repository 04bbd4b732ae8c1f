"""Philox 4x32-10, the one counter-based random generator (Salmon et al. 2011, "Parallel random numbers").

Every number is a pure function of (seed, sample, step, element), so that a draw depends on neither batch size, layout
nor device. Key: the 64-bit seed. Counter: (element / 4, step, low and high word of the sample); the four words of one
counter belong to four elements in a row.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10


def philox_uint32(seed: int, samples: Tensor, step: int, elements: int) -> Tensor:
    """Random 32-bit words as int64 (N, elements) for the samples (N,) int64, on their device."""
    blocks = torch.arange(-(-elements // 4), device=samples.device)
    samples = samples[:, None]
    c0, c1 = blocks.expand(len(samples), -1), torch.full_like(blocks, step & _WORD).expand(len(samples), -1)
    c2, c3 = (samples & _WORD).expand_as(c0), ((samples >> 32) & _WORD).expand_as(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so both words of the unsigned product come out right
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((odd >> 32) & _WORD) ^ c1 ^ k0, odd & _WORD
        c2, c3 = ((even >> 32) & _WORD) ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :elements]


def philox_normal(seed: int, samples: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers fp32 (N, *shape) for the samples (N,) int64, on their device.

    Neighbouring words make a pair of normals (Box & Muller 1958), with Triton's mapping of words to uniform numbers.
    """
    elements = math.prod(shape)
    words = philox_uint32(seed, samples, step, -(-elements // 4) * 4)
    # a word with its sign bit set is folded onto the positive ones, then scaled to [0, 1)
    folded = torch.where(words > 0x7FFFFFFF, _WORD - words, words)
    u1, u2 = (folded.to(torch.float32) * 4.6566127342e-10).unflatten(-1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp(min=1e-7)))
    angle = 2 * math.pi * u2
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(1)
    return normals[:, :elements].view(len(samples), *shape)
