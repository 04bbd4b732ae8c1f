"""UNet outputs and gradients for given weights, under every implementation that runs on a CPU."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff.models.blocks import set_fuses

from .support import assert_close, golden_model, golden_names, load, projection, tensor

TOLERANCE = 1e-4
LAYOUTS = ("contiguous", "channels_last")
KEYS = {"flags", "x", "t", "out_weight", "out", "grad_x", "grad_names", "grad_projection", "grad_norm"}


def cases() -> list[Any]:
    """Every model in every engine and layout; interpreted, the smallest one in one layout is quick.

    The kernels are also tested without the work that they take over from operations beside the norms.
    """
    found = []
    engines = itertools.product(golden_names("unet_*.npz"), ("reference", "torch", "triton", "triton alone"), LAYOUTS)
    for name, kernels, layout in engines:
        slow = kernels.startswith("triton") and (layout, name) != ("channels_last", "unet_uncond32.npz")
        found.append(pytest.param(name, kernels, layout, marks=[pytest.mark.slow] if slow else []))
    return found


@pytest.mark.parametrize(("name", "kernels", "memory_format"), cases())
def test_output_and_gradients(name: str, kernels: str, memory_format: str) -> None:
    data = load(name)
    model = golden_model(data["flags"], kernels.split()[0], memory_format).eval()
    set_fuses(model, kernels != "triton alone")
    conditions = {key: tensor(data[key]) for key in ("y", "low_res") if key in data}
    assert set(data) == KEYS | set(conditions)

    x = tensor(data["x"]).requires_grad_()
    out = model(x, tensor(data["t"]), **conditions)
    assert_close(out, data["out"], TOLERANCE, "out")
    (out * tensor(data["out_weight"])).sum().backward()
    assert_close(x.grad, data["grad_x"], TOLERANCE, "grad_x")

    assert_gradients(model, data)


def assert_gradients(model: torch.nn.Module, data: Mapping[str, Any]) -> None:
    """Every parameter's gradient, by its norm and its projection, in the originals' order."""
    parameters = dict(model.named_parameters())
    assert list(parameters) == data["grad_names"].tolist()
    # What only shifts the one channel of a norm's group has no effect: its gradient is rounding.
    noise = 1e-6 * data["grad_norm"].max()
    for key, golden_norm, golden_projection in zip(
        data["grad_names"], data["grad_norm"], data["grad_projection"], strict=True
    ):
        gradient = parameters[key].grad
        norm = float(gradient.double().norm())
        limit = TOLERANCE * golden_norm if golden_norm > noise else noise
        assert abs(norm - golden_norm) <= limit, f"{key}: norm {norm}, golden {golden_norm}"
        difference = abs(projection(key, gradient) - golden_projection)
        assert difference <= limit, f"{key}: projection off by {difference}, norm {golden_norm}"
    assert np.mean(data["grad_norm"] > noise) > 0.9
