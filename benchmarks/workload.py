"""The model, process and batch that are measured, their inputs, and the check before any timing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.config import DiffusionConfig, ModelConfig, Precision

TOLERANCE = {Precision.FP32: 1e-4, Precision.TF32: 1e-2, Precision.BF16: 5e-2, Precision.FP16: 1e-2}
"""Largest relative error of a candidate's output against the plain path's, beyond which no time is reported."""


@dataclass(frozen=True)
class Workload:
    """The model, process and batch that a suite runs; ``name`` is the preset's, if there is one."""

    model: ModelConfig
    diffusion: DiffusionConfig
    batch_size: int
    device: torch.device
    name: str = ""

    def __str__(self) -> str:
        kind = self.name or f"{self.model.image_size} pixels, {self.model.num_channels} channels"
        return f"{kind}, batch {self.batch_size}"


def inputs(workload: Workload) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Images (N, 3, H, W), timesteps (N,) int64, and the model's further arguments."""
    generator = torch.Generator().manual_seed(0)
    size, model = workload.batch_size, workload.model
    x = torch.rand(size, 3, model.image_size, model.image_size, generator=generator) * 2 - 1
    t = torch.randint(workload.diffusion.diffusion_steps, (size,), generator=generator)
    conditions = {}
    if model.class_cond:
        conditions["y"] = torch.arange(size) % model.num_classes
    if model.small_size:
        conditions["low_res"] = torch.rand(size, 3, model.small_size, model.small_size, generator=generator) * 2 - 1
    return (
        x.to(workload.device),
        t.to(workload.device),
        {name: value.to(workload.device) for name, value in conditions.items()},
    )


def randomised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Small random numbers for zero-initialised weights, so that comparing outputs covers the complete model."""
    return {k: torch.randn_like(v) * 0.02 if not v.any() else v for k, v in state.items()}


def require_close(
    found: Tensor, expected: Tensor, tolerance: float, verdict: str, what: str = "output", floor: Tensor | float = 0.0
) -> None:
    """Raise a ValueError if the relative error exceeds ``tolerance``: a wrong result is not timed.

    ``floor`` is added to the norm of ``expected``, for values that are only rounding errors.
    """
    error = float((found - expected).norm() / (expected.norm() + floor))
    if not error <= tolerance:
        raise ValueError(f"{verdict} by {error:.1e} in its {what} (allowed {tolerance:.0e}): not timed")
