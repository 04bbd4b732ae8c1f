"""How fast this very device copies memory and multiplies matrices: what a kernel's figures are shares of."""

import statistics
from dataclasses import dataclass

import torch

from fastdiff.benchmarks.harness import seconds_of


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings of a device."""

    bytes_per_s: float  # read plus written, by a large copy
    flops_per_s: float  # of a large matrix product

    def floor(self, n_bytes: int, flops: int) -> float:
        """The seconds below which nothing runs that moves and computes so much."""
        return max(n_bytes / self.bytes_per_s, flops / self.flops_per_s)


def measure_roofs(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> Roofs:
    """Copy and multiply what fills the device; random numbers, since zeros multiply faster."""
    on_gpu = device.type == "cuda"
    n_bytes = 2**30 if on_gpu else 2**27
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copying = seconds_of(lambda: target.copy_(source), rounds, device)
    size = 8192 if on_gpu else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    multiplying = seconds_of(lambda: torch.mm(a, b, out=product), rounds, device)
    return Roofs(2 * n_bytes / statistics.median(copying), 2 * size**3 / statistics.median(multiplying))
