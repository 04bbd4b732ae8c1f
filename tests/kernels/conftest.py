"""What the kernel tests share: where they run, and fresh memory full of NaN."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.kernels.launch import forget

with torch.device("meta"):
    torch.empty(0)  # what a device context looks up once and for all must be the real functions, not those below


@pytest.fixture(autouse=True)
def _plans_count() -> None:
    """A test may change a plan, which is no argument of a call."""
    forget()


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten shows up as NaN (or as the largest integer)."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point():
                fresh.detach().fill_(float("nan"))
            elif fresh.dtype is not torch.bool and not fresh.is_complex():
                fresh.fill_(torch.iinfo(fresh.dtype).max)
            return fresh

        return wrapped

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
