"""A smoke test: it runs every kernel for compute-sanitizer and asserts only that results are finite.

Forward and backward, at sizes whose ends are ragged, and in a short time. Correctness is held by the files that have an
operation's name: test_group_norm_silu*, test_attention*, test_diffusion_step, test_diffusion_loss and test_philox.
"""

from typing import Any

import pytest
import torch

from fastdiff.kernels import attention, diffusion_loss, diffusion_step, group_norm_silu, philox_normal
from fastdiff.kernels.gaussian import TABLES

from .support import DEVICE, TRITON_DTYPES, random
from .test_group_norm_silu_full import KINDS, change_plan

smoke = pytest.mark.slow if DEVICE.type == "cpu" else lambda test: test
"""Interpreted, these show nothing that the files of the operations do not."""


def leaf(*shape: int, seed: int, dtype: torch.dtype, memory_format: Any = torch.contiguous_format) -> torch.Tensor:
    x = random(*shape, seed=seed, dtype=dtype).to(DEVICE).contiguous(memory_format=memory_format)
    return x.requires_grad_()


def assert_finite(*results: torch.Tensor) -> None:
    assert all(torch.isfinite(result).all() for result in results)


@smoke
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("plan", KINDS)
def test_smoke_of_group_norm_silu(
    plan: str, memory_format: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_plan(monkeypatch, plan)
    x = leaf(2, 96, 7, 5, seed=1, dtype=dtype, memory_format=memory_format)
    weight, bias = (leaf(96, seed=seed, dtype=torch.float32) for seed in (2, 3))
    scale, shift = leaf(2, 192, seed=4, dtype=dtype).chunk(2, dim=1)
    y = group_norm_silu(x, weight, bias, scale=scale, shift=shift, backend="triton")
    assert_finite(y, *torch.autograd.grad(y, [x, weight, bias, scale, shift], torch.ones_like(y)))


@smoke
@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [
        *((tokens, d, torch.float16) for tokens, d in ((5, 24), (64, 64), (100, 96), (130, 48), (200, 144), (300, 64))),
        *((tokens, d, torch.float32) for tokens, d in ((5, 24), (40, 48))),
    ],
)
def test_smoke_of_attention(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv = leaf(2, tokens, 6 * head_dim, seed=1, dtype=dtype)
    y = attention(qkv, 2, backend="triton")
    assert_finite(y, *torch.autograd.grad(y, qkv, torch.ones_like(y)))


@smoke
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (32, 33)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_smoke_of_philox_diffusion_loss_and_diffusion_step(
    memory_format: torch.memory_format, size: tuple[int, int]
) -> None:
    tables = (0.5 * torch.rand(10, len(TABLES), generator=torch.Generator().manual_seed(0)) + 0.1).to(DEVICE)
    t = torch.tensor([0, 7, 9], device=DEVICE)
    x, x_start = (random(3, 3, *size, seed=seed).to(DEVICE) for seed in (1, 2))
    output = leaf(3, 6, *size, seed=3, dtype=torch.float32, memory_format=memory_format)
    noise = philox_normal(5, torch.arange(3, device=DEVICE), 0, (3, *size), backend="triton")
    losses = diffusion_loss(output, x_start.clamp(-1, 1), x, noise, t, tables, backend="triton")
    (gradient,) = torch.autograd.grad(losses.loss.sum(), output)
    found = [noise, losses.loss, gradient]
    with torch.no_grad():
        for sampler, eta in (("ddpm", 0.0), ("ddim", 0.5)):
            step = diffusion_step(
                x, output, t, tables, sampler=sampler, eta=eta, seed=5, pred_xstart=True, backend="triton"
            )
            found += list(step)
    assert_finite(*found)


# Not smoke tests: arguments without an element, and a gradient that there is not


def test_no_tokens() -> None:
    qkv = leaf(2, 0, 3 * 64, seed=1, dtype=torch.float32)
    y = attention(qkv, 2, backend="triton")
    (dqkv,) = torch.autograd.grad(y, qkv, torch.ones_like(y))
    assert (y.shape, dqkv.shape) == ((2, 0, 64), (2, 0, 192))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_no_images(backend: str) -> None:
    tables = torch.rand(10, len(TABLES), device=DEVICE)
    x, output, t = torch.zeros(0, 3, 4, 4), torch.zeros(0, 6, 4, 4), torch.zeros(0, dtype=torch.int64)
    x, output, t = x.to(DEVICE), output.to(DEVICE), t.to(DEVICE)
    assert diffusion_step(x, output, t, tables, seed=1, backend=backend).sample.shape == x.shape
    assert diffusion_loss(output, x, x, x, t, tables, backend=backend).loss.shape == (0,)


def test_gradients_that_the_loss_has_not_are_refused() -> None:
    tables = torch.rand(10, len(TABLES), device=DEVICE)
    x, output = (leaf(2, channels, 4, 4, seed=channels, dtype=torch.float32) for channels in (3, 6))
    t = torch.tensor([1, 2], device=DEVICE)
    with pytest.raises(ValueError, match="diffusion_loss: backend triton has a gradient for model_output alone"):
        diffusion_loss(output, x.detach(), x, x.detach(), t, tables, backend="triton")
    loss = diffusion_loss(output, x.detach(), x, x.detach(), t, tables, loss_type="kl", backend="auto").loss
    assert torch.autograd.grad(loss.sum(), x)[0].any()
