"""The fused operations under pytest-benchmark: ``pytest fastdiff/benchmarks`` or ``pytest benchmarks``."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastdiff.kernels import attention, group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("channels", "size"), [(64, 32), (128, 16), (256, 16)])
def test_group_norm_silu(benchmark: BenchmarkFixture, backend: str, channels: int, size: int) -> None:
    """Forward in bf16 and channels_last, batch 16, with scale and shift."""
    x = torch.randn(16, channels, size, size, device=DEVICE, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(channels, device=DEVICE), torch.zeros(channels, device=DEVICE)
    scale, shift = torch.randn(2, 16, channels, device=DEVICE, dtype=torch.bfloat16)
    benchmark(_timed(lambda: group_norm_silu(x, weight, bias, scale=scale, shift=shift, backend=backend)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("tokens", [64, 256])
def test_attention(benchmark: BenchmarkFixture, backend: str, tokens: int) -> None:
    """Forward in bf16, batch 16, four heads of 32."""
    qkv = torch.randn(16, tokens, 3 * 128, device=DEVICE, dtype=torch.bfloat16)
    benchmark(_timed(lambda: attention(qkv, 4, backend=backend)))


def _timed(run: Callable[[], object]) -> Callable[[], None]:
    """``run``, and waiting until the device has done it."""

    def wrapped() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return wrapped
