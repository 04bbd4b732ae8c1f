"""The public operations: check the arguments and choose the implementation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.kernels.backend import HAS_TRITON, Backend, Implementation, choose, require
from fastdiff.kernels.philox import pytorch

WORDS: dict[Backend, Implementation] = {Backend.TORCH: pytorch.philox_uint32, Backend.REFERENCE: pytorch.philox_uint32}
NORMALS: dict[Backend, Implementation] = {
    Backend.TORCH: pytorch.philox_normal,
    Backend.REFERENCE: pytorch.philox_normal,
}
if HAS_TRITON:
    from fastdiff.kernels.philox import kernel

    WORDS[Backend.TRITON] = kernel.words
    NORMALS[Backend.TRITON] = kernel.normals


def philox_uint32(
    seed: int, samples: Tensor, step: int, elements: int, *, backend: Backend | str = Backend.AUTO
) -> Tensor:
    """Random 32-bit words as int64 (N, elements) for the samples (N,) int64, on their device.

    seed: 0 to 2^64 - 1; step: 0 to 2^32 - 1. Every backend draws the same words.
    """
    _check("philox_uint32", samples)
    return choose("philox_uint32", backend, WORDS, _drawn(samples))(seed, samples, step, elements)


def philox_normal(
    seed: int, samples: Tensor, step: int, shape: Sequence[int], *, backend: Backend | str = Backend.AUTO
) -> Tensor:
    """Standard normal numbers fp32 (N, *shape) for the samples (N,) int64, on their device.

    seed: 0 to 2^64 - 1; step: 0 to 2^32 - 1. Two adjacent words give a pair of normals (Box & Muller 1958), with
    Triton's mapping of words to uniform numbers. The backends' normals agree to a few roundings.
    """
    _check("philox_normal", samples)
    draw = choose("philox_normal", backend, NORMALS, _drawn(samples))
    return draw(seed, samples, step, math.prod(shape)).view(len(samples), *shape)


def _check(op: str, samples: Tensor) -> None:
    fits = samples.ndim == 1 and samples.dtype is torch.int64
    require(fits, op, "samples must be (N,) int64, not {} {}", tuple(samples.shape), samples.dtype)


def _drawn(samples: Tensor) -> Tensor:
    """A floating-point tensor on the samples' device, by which a backend is chosen."""
    return samples.new_empty(0, dtype=torch.float32)
