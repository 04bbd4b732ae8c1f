"""How the golden models run where there is no GPU."""

from importlib import import_module
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes time by the operation, whatever its size, and tiles for fp32 are small on a GPU."""
    if torch.cuda.is_available():
        return
    plan = import_module("fastdiff.kernels.attention.plan")
    for name in ("forward", "backward_queries", "backward_keys"):
        monkeypatch.setattr(plan, name, lambda *_: plan.Tiles(256, 256, 4))
    norm = import_module("fastdiff.kernels.group_norm_silu.plan")

    def whole_samples(samples: int, channels: int, pixels: int, groups: int, *_: object) -> Any:
        return norm.Plan(groups, norm.next_power(channels), norm.next_power(pixels), 1, pixels, warps=8)

    monkeypatch.setattr(norm, "plan", whole_samples)
