"""The generator as a registered operator."""

import torch
import triton
from torch import Tensor

from fastdiff.kernels.launch import launch, register
from fastdiff.kernels.philox import generator

QUADS = 256
"""Counters per program."""


def signed(seed: int) -> int:
    """A 64-bit seed as the signed integer with the same bits, which operators and kernels take."""
    return (seed + 2**63) % 2**64 - 2**63


def philox_draw(samples: Tensor, seed: int, step: int, elements: int, normal: bool) -> Tensor:
    """Words as int64 or normals as fp32, (N, elements)."""
    out = _out(samples, seed, step, elements, normal)
    blocks = triton.cdiv(elements, 4 * QUADS)
    launch(
        generator.philox_draw,
        (len(samples) * blocks,),
        samples.device,
        num_warps=4,
        num_stages=1,
        out=out,
        samples=samples,
        seed=seed,
        step=step,
        elements=elements,
        sample_stride=samples.stride(0),
        blocks=blocks,
        NORMAL=normal,
        Q=QUADS,
    )
    return out


def _out(samples: Tensor, seed: int, step: int, elements: int, normal: bool) -> Tensor:
    dtype = torch.float32 if normal else torch.int64
    return torch.empty((len(samples), elements), dtype=dtype, device=samples.device)


_draw = register(philox_draw, _out)


def words(seed: int, samples: Tensor, step: int, elements: int) -> Tensor:
    """See op.py."""
    return _draw(samples, signed(seed), step, elements, False)


def normals(seed: int, samples: Tensor, step: int, elements: int) -> Tensor:
    """See op.py; (N, elements)."""
    return _draw(samples, signed(seed), step, elements, True)
