"""The ceilings: what they are made of, and the limit that follows from them."""

import math

import pytest
import torch

from fastdiff.benchmarks import roofline as module
from fastdiff.benchmarks.flops import Convolution, Flops
from fastdiff.benchmarks.roofline import Roofline, measure_roofline

from .support import CPU, measure_little

ROOFS = Roofline(bytes_per_s=100, flops_per_s=1000, conv_flops_per_s=2000)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Flops(4000, 1000, numbers=1), 3),  # computing takes longer: 2 s and 1 s, one after the other
        (Flops(4000, 1000, numbers=300), 6),  # moving does, at 2 bytes a number
        (Flops(4000, 1000, numbers=300, fp32_bytes=200), 8),
        (Flops(0, 1000, numbers=0), 1),
    ],
)
def test_the_limit_is_the_longer_of_moving_and_computing(work: Flops, seconds: float) -> None:
    assert ROOFS.limit(work, torch.bfloat16) == seconds


def test_without_convolutions_none_are_measured() -> None:
    roofline = Roofline(100, 1000)
    assert roofline.limit(Flops(0, 1000, 0), torch.float32) == 1
    assert math.isnan(roofline.limit(Flops(1, 1000, 0), torch.float32))  # rather than one that is too low
    assert "convolution" not in str(roofline)


def test_the_fastest_of_the_heaviest_convolutions_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: list[Convolution] = []
    backward: list[Convolution] = []

    def rate(shape: Convolution, device: torch.device, dtype: torch.dtype, rounds: int, training: bool) -> float:
        (backward if training else forward).append(shape)
        return 1.0 if training else float(shape.size == 16) + 1

    monkeypatch.setattr(module, "_convolution_rate", rate)
    monkeypatch.setattr(module, "seconds_of", lambda run, rounds, device: [2.0] * rounds)
    monkeypatch.setattr(module, "ENOUGH", {"cpu": 1.0})
    small, large = Convolution(1, 32, 32, 16), Convolution(1, 32, 32, 24)
    rare = [Convolution(1, 1, 1, size) for size in range(2, 8)]
    counts = {**dict.fromkeys(rare, 1), small: 9, large: 1}
    roofline = measure_roofline(CPU, torch.float32, 2, counts)
    assert set(forward) == {small, large, *rare[-2:]}
    assert backward == [small]
    assert (roofline.conv_flops_per_s, roofline.conv_training_flops_per_s) == (2, 1)
    assert roofline.flops_per_s == 2 * 1024**3 / 2
    assert roofline.bytes_per_s == 2 * 2**27 / 2


@pytest.mark.parametrize(("device", "gigaflops"), [("cpu", 10), ("cuda", 1000)])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_the_rate_is_the_devices_whatever_the_batch(device: str, gigaflops: int, batch_size: int) -> None:
    def large(channels: int, size: int) -> Convolution:
        return module._enlarged(Convolution(batch_size, channels, channels, size), torch.device(device), torch.bfloat16)

    for found in (large(192, 16), large(192, 64)):
        assert gigaflops <= found.flops / 1e9 < 1.3 * gigaflops
    filling = module._enlarged(Convolution(1, 3, 64, 32), torch.device(device), torch.float32)
    assert filling.batch_size * 64 * 32**2 * 4 <= module.FILLING[device]
    huge = Convolution(1, 4096, 4096, 4096)
    assert module._enlarged(huge, torch.device(device), torch.float32) == huge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_measured(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    measure_little(monkeypatch)
    roofline = measure_roofline(CPU, dtype, 1, {Convolution(2, 32, 32, 8): 1})
    rates = (roofline.bytes_per_s, roofline.flops_per_s, roofline.conv_flops_per_s, roofline.conv_training_flops_per_s)
    assert all(0 < rate < math.inf for rate in rates)
    assert str(roofline).startswith("copy ")
    assert "3x3 convolution" in str(roofline)
