"""What the tests of attention share: its formula, runs of an implementation, and views of packed tensors."""

import math

import torch
from torch import Tensor

from fastdiff.kernels import attention

from .support import DEVICE, assert_all_within_budget, random


def formula(qkv: Tensor, heads: int) -> Tensor:
    """The definition head by head: C channels of a head are its q, then its k, then its v."""
    d = qkv.shape[2] // (3 * heads)
    outs = []
    for block in qkv.split(3 * d, dim=2):
        q, k, v = block.split(d, dim=2)  # (N, T, D) each
        scores = q @ k.transpose(1, 2) / math.sqrt(d)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outs.append(weights @ v / weights.sum(-1, keepdim=True))
    return torch.cat(outs, dim=2)


def run(backend: str, qkv: Tensor, heads: int, grad: Tensor) -> dict[str, Tensor]:
    """y and the gradient of qkv from one implementation; "truth" is the formula in float64."""
    leaf = (qkv.double() if backend == "truth" else qkv).detach().requires_grad_()
    y = formula(leaf, heads) if backend == "truth" else attention(leaf, heads, backend=backend)
    (dqkv,) = torch.autograd.grad(y, leaf, grad.to(y.dtype))
    return {"y": y.detach(), "dqkv": dqkv}


def hold(backend: str, qkv: Tensor, heads: int, grad: Tensor | None = None) -> None:
    """y and the gradient within the error budget of the reference."""
    if grad is None:
        grad = random(*qkv.shape[:2], qkv.shape[2] // 3, seed=2, dtype=qkv.dtype)
    if backend == "triton":
        qkv, grad = qkv.to(DEVICE), grad.to(DEVICE)
    found, reference, truth = (run(name, qkv, heads, grad) for name in (backend, "reference", "truth"))
    assert {value.dtype for value in found.values()} == {qkv.dtype}
    assert backend != "triton" or all(value.is_contiguous() for value in found.values())
    assert_all_within_budget(found, reference, truth)


VIEWS = {
    "(N, 3C, T) transposed": lambda t: random(2, 144, t, seed=7).transpose(1, 2),
    "time outermost": lambda t: random(t, 2, 144, seed=7).transpose(0, 1),
    "channel slice": lambda t: random(2, t, 200, seed=7)[:, :, 20:164],
    "every second channel": lambda t: random(2, t, 288, seed=7)[:, :, ::2],
    "every second token": lambda t: random(2, 2 * t, 144, seed=7)[:, ::2],
    "one image for all": lambda t: random(1, t, 144, seed=7).expand(2, -1, -1),
}
