"""Steps where gradients are recorded: the kernels have none there, and must not leave them out in silence."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.diffusion import Philox
from fastdiff.kernels.backend import HAS_TRITON

from ..support import refusal
from .support import process, randn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = torch.tensor([3, 40], device=DEVICE)
STEPS = ["p_sample", "ddim_sample"]


def step(name: str, kernels: str, weight: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """One step of a model with the given weight; "ddim" at eta 1, so that both need noise."""
    x = randn(2, 3, 4, 4, dtype=torch.float32).to(DEVICE)
    kwargs |= {"eta": 1.0} if name == "ddim_sample" else {}
    d = process(kernels=kernels)
    kwargs.setdefault("noise", Philox(5, torch.arange(2, device=DEVICE)))
    return getattr(d, name)(lambda x, t: weight * x, x, T, **kwargs)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("name", STEPS)
def test_the_kernel_asks_for_no_grad(name: str) -> None:
    weight = torch.full((), 0.5, device=DEVICE, requires_grad=True)
    expected = step(name, "reference", weight)
    refusal(lambda: step(name, "triton", weight), r"has no gradient: call it under torch\.no_grad\(\)")
    found = [step(name, "triton", weight.detach())]  # gradients are on, but nothing wants any
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found.append(step(name, "triton", weight))
    for out in found:
        for key, value in expected.items():
            assert not out[key].requires_grad
            torch.testing.assert_close(out[key], value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("wanted", ["weight", "noise"])
def test_auto_has_the_gradient(name: str, wanted: str) -> None:
    gradients = []
    for kernels in ("auto", "reference"):
        weight = torch.full((), 0.5, device=DEVICE, requires_grad=wanted == "weight")
        noise = randn(2, 3, 4, 4, seed=1, dtype=torch.float32).to(DEVICE).requires_grad_(wanted == "noise")
        out = step(name, kernels, weight, noise=noise)
        gradients.append(torch.autograd.grad(out["sample"].sum(), weight if wanted == "weight" else noise)[0])
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0
