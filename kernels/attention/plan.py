"""How attention is divided among programs: a pure function of sequence length, head dimension, dtype and kind of GPU.

Hopper's tiles of the forward pass for 256 tokens and head dimensions of 96 and 128, and of the backward pass for 64 and
96, were chosen by measurements on an H200. Others are the largest that compile for sm_80, sm_90, sm_100 and gfx942
without spilling registers and fit the shared memory (on Blackwell also the tensor memory) of each.
"""

from dataclasses import dataclass
from functools import cache

import torch

AT_ONCE_UP_TO = 128
"""Longest sequence whose scores are one tile."""
WARPGROUPS_WITHOUT_A_GPU = True
"""Whether plans are Hopper's if there is no GPU, where launches are only interpreted or recorded."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a program, queries and keys at a time, with its warps and its pipeline stages of loads."""

    queries: int
    keys: int
    warps: int
    stages: int = 2


def next_power(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


def parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two powers of two of at least 16, or one and 0, that cover the head dimension: 144 = 128 + 16, 64 = 64 + 0.

    fp32 uses two parts if possible: its sums over channels are chains of fma, and two chains of half the length have a
    smaller error than one (see ``inner`` in tiles.py).
    """
    whole = next_power(head_dim)
    first = whole // 2
    second = max(next_power(head_dim - first), 16)
    if first + second < whole or (dtype is torch.float32 and first >= 16):
        return first, second
    return whole, 0


@cache
def _has_warpgroups(index: int | None) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] in (9, 10)


def has_warpgroups(device: torch.device) -> bool:
    """Whether matrix products read their operands from shared memory, as on Hopper and Blackwell's data centre GPUs.

    Elsewhere operands occupy registers, and shared memory may be as small as 99 KB, or 64 KB on AMD's GPUs.
    """
    return _has_warpgroups(device.index) if device.type == "cuda" else WARPGROUPS_WITHOUT_A_GPU


def _fp32(head_dim: int) -> Tiles:
    """The same in every pass, so that recomputed scores have the same rounding errors: a softmax cancels those."""
    return Tiles(16, 32, 4) if head_dim <= 192 else Tiles(16, 16, 8)


def forward(tokens: int, head_dim: int, dtype: torch.dtype, warpgroups: bool) -> Tiles:
    """Tiles of the forward pass."""
    if dtype is torch.float32:
        return _fp32(head_dim)
    if tokens <= AT_ONCE_UP_TO and (warpgroups or (tokens <= 64 and head_dim <= 144)):
        block = max(next_power(tokens), 16)
        return Tiles(block, block, 4 if block <= 64 else 8)
    if not warpgroups:
        return Tiles(64, 64 if head_dim <= 144 else 32, 4)
    if head_dim <= 64:
        return Tiles(128, 64, 8, 3)  # in 128 registers: two programs share a multiprocessor
    if head_dim <= 144:  # of eight warps only one program fits on a multiprocessor
        return Tiles(128, 64, 4) if head_dim <= 96 else Tiles(64, 64, 4, 3 if head_dim <= 128 else 2)
    return Tiles(128, 64, 8)


def backward_at_once(tokens: int, head_dim: int, dtype: torch.dtype, warpgroups: bool) -> Tiles | None:
    """Tiles of a backward pass in a single launch, or None if it takes two."""
    if dtype is torch.float32 and tokens > 16:
        return None
    block = max(next_power(tokens), 16)
    if tokens <= min(AT_ONCE_UP_TO, 64) and (warpgroups or head_dim <= 96):
        return Tiles(block, block, _fp32(head_dim).warps if dtype is torch.float32 else 4)
    if warpgroups and tokens <= AT_ONCE_UP_TO and head_dim <= 144:
        return Tiles(block, block, 8)
    return None


def backward_queries(head_dim: int, dtype: torch.dtype, warpgroups: bool) -> Tiles:
    """Tiles of the launch that computes dq."""
    if dtype is torch.float32:
        return _fp32(head_dim)
    if warpgroups:
        return Tiles(64, 64, 4)
    return Tiles(64, 32, 4) if head_dim <= 192 else Tiles(32, 32, 4)


def backward_keys(head_dim: int, dtype: torch.dtype, warpgroups: bool) -> Tiles:
    """Tiles of the launch that computes dk and dv."""
    if dtype is torch.float32:
        return _fp32(head_dim)
    if warpgroups:
        if head_dim <= 128:
            return Tiles(64 if head_dim <= 96 else 32, 64, 4)
        if head_dim <= 144:
            return Tiles(32, 128, 8)
        return Tiles(32 if head_dim <= 192 else 16, 64, 8)
    if head_dim <= 144:
        return Tiles(32 if head_dim <= 128 else 16, 64, 4)
    return Tiles(16, 32, 4)
