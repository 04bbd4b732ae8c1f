"""How fast this device copies memory, multiplies matrices and convolves: the rates behind every share of the limit."""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F

from fastdiff.benchmarks.flops import Convolution, Flops
from fastdiff.benchmarks.harness import seconds_of

SHAPES = 4
"""Number of a model's convolutions that are tried, those with the most operations first."""

ENOUGH = {"cpu": 10e9, "cuda": 1e12}
"""Operations of a convolution that is large enough to reach the device's rate, whatever the model's batch."""

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the multiplied matrices."""

FILLING = {"cpu": 2**27, "cuda": 2**30}
"""Bytes of the copied tensors, and the limit for a convolution's larger tensor."""


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings of a device in one dtype."""

    bytes_per_s: float  # read plus written, by a large copy
    flops_per_s: float  # of a large matrix product
    conv_flops_per_s: float = math.nan  # of the fastest 3x3 convolution of the model in a large batch, forward
    conv_training_flops_per_s: float = math.nan  # of the same one with its backward pass

    def floor(self, n_bytes: float, matmul_flops: float, conv_flops: float = 0) -> float:
        """The least seconds in which the device can move and compute this much."""
        computing = matmul_flops / self.flops_per_s + (conv_flops / self.conv_flops_per_s if conv_flops else 0)
        moving = n_bytes / self.bytes_per_s
        return moving if moving > computing else computing  # unlike max, NaN if a rate is missing

    def limit(self, work: Flops, dtype: torch.dtype) -> float:
        """The floor of a model's passes in ``dtype``, for training, too, at the rate of the forward convolutions.

        A backward pass consists of equally large convolutions. If the libraries are slower at them, the device is not.
        """
        return self.floor(work.n_bytes(dtype), work.matmul_flops, work.conv_flops)

    def or_better(self, other: "Roofline") -> "Roofline":
        """The higher value of each rate, from two measurements of the same device."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Roofline(*(b if math.isnan(a) or b > a else a for a, b in pairs))

    def __str__(self) -> str:
        if math.isnan(self.bytes_per_s):
            return "out of memory, so the share of the limit is unknown"
        said = f"copy {self.bytes_per_s / 1e9:.0f} GB/s, matrix product {_rate(self.flops_per_s)}"
        if math.isnan(self.conv_flops_per_s):
            return said
        training = _rate(self.conv_training_flops_per_s)
        return f"{said}, 3x3 convolution {_rate(self.conv_flops_per_s)} ({training} with its backward pass)"


def measure_roofline(
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = 10,
    convolutions: Mapping[Convolution, int] = MappingProxyType({}),
) -> Roofline:
    """Copy, multiply and convolve tensors that fill the device; random numbers, because zeros multiply faster.

    The fastest round counts: the machine's other work must not lower a ceiling.

    ``convolutions`` are those of a model's forward pass, with their counts. The fastest of the SHAPES with the most
    operations in it, in a batch of ENOUGH operations, is the device's rate for a 3x3 convolution.
    """
    size, n_bytes = SIDE[device.type], FILLING[device.type]
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copying = seconds_of(lambda: target.copy_(source), rounds, device)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    multiplying = seconds_of(lambda: torch.mm(a, b, out=product), rounds, device)
    rates = 2 * n_bytes / min(copying), 2 * size**3 / min(multiplying)
    return Roofline(*rates, *_convolution_rates(device, dtype, rounds, convolutions))


def _convolution_rates(
    device: torch.device, dtype: torch.dtype, rounds: int, convolutions: Mapping[Convolution, int]
) -> tuple[float, float]:
    """The best forward rate, and the rate of the same convolution forward and backward."""
    heaviest = sorted(convolutions, key=lambda c: c.flops * convolutions[c], reverse=True)[:SHAPES]
    if device.type == "cpu":
        rounds = min(rounds, 3)  # each takes a tenth of a second or more
    large = [_enlarged(shape, device, dtype) for shape in heaviest]
    rates = {shape: _convolution_rate(shape, device, dtype, rounds, training=False) for shape in large}
    if not rates:
        return math.nan, math.nan
    best = max(rates, key=rates.__getitem__)
    return rates[best], _convolution_rate(best, device, dtype, rounds, training=True)


def _enlarged(shape: Convolution, device: torch.device, dtype: torch.dtype) -> Convolution:
    """The convolution with enough images for ENOUGH operations, or with as many as FILLING allows."""
    one = replace(shape, batch_size=1)
    image_bytes = max(shape.channels_in, shape.channels_out) * shape.size**2 * dtype.itemsize
    enough = min(math.ceil(ENOUGH[device.type] / one.flops), FILLING[device.type] // image_bytes)
    return replace(shape, batch_size=max(1, enough))


def _convolution_rate(
    shape: Convolution, device: torch.device, dtype: torch.dtype, rounds: int, training: bool
) -> float:
    x = torch.randn(shape.batch_size, shape.channels_in, shape.size, shape.size, device=device, dtype=dtype)
    weight = torch.randn(shape.channels_out, shape.channels_in, 3, 3, device=device, dtype=dtype) / 100
    x, weight = (v.contiguous(memory_format=torch.channels_last).requires_grad_(training) for v in (x, weight))
    gradient = torch.randn_like(F.conv2d(x, weight, padding=1)) if training else None

    def run() -> None:
        y = F.conv2d(x, weight, padding=1)
        if training:
            torch.autograd.grad(y, (x, weight), gradient)

    return (3 if training else 1) * shape.flops / min(seconds_of(run, rounds, device))


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.1f} TFLOP/s" if flops_per_s >= 1e13 else f"{flops_per_s / 1e9:.0f} GFLOP/s"
