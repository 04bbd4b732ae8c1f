"""What the kernel tests share: the error budget, which comes from float64."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that are exact in ``dtype``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, truth: Tensor) -> float:
    """The largest distance from the float64 truth."""
    assert found.shape == truth.shape
    assert truth.dtype == torch.float64
    return float((found.double() - truth).abs().max()) if truth.numel() else 0.0


def rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What one rounding to ``dtype`` may cost the largest element."""
    return float(truth.abs().max()) * torch.finfo(dtype).eps / 2 if truth.numel() else 0.0


def assert_within_budget(found: Tensor, reference: Tensor, truth: Tensor, what: str) -> None:
    """err(found, fp64) <= 2 * err(reference in that dtype, fp64) + one rounding."""
    assert torch.isfinite(found).all(), what
    limit = 2 * error(reference, truth) + rounding(truth, found.dtype)
    assert error(found, truth) <= limit, f"{what}: error {error(found, truth):.3g} over the budget {limit:.3g}"
