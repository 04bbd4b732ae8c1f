"""guided-diffusion's classifiers: logits, the gradient that guides, and every parameter's gradient."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from .support import assert_close, golden_classifier, golden_names, load, tensor
from .test_unet import LAYOUTS, TOLERANCE, assert_gradients

KEYS = {"flags", "x", "t", "y", "logits", "log_probability", "grad_log_probability", "cross_entropy"}
KEYS |= {"grad_names", "grad_projection", "grad_norm"}
NAMES = [name for name in golden_names("classifier_*.npz") if "training" not in name]


def cases() -> list[Any]:
    """Every classifier in every engine and layout; Triton's interpreter takes long."""
    return [
        pytest.param(name, kernels, layout, marks=[pytest.mark.slow] if kernels == "triton" else [])
        for name, kernels, layout in itertools.product(NAMES, ("reference", "torch", "triton"), LAYOUTS)
    ]


@pytest.mark.parametrize(("name", "kernels", "memory_format"), cases())
def test_logits_and_gradients(name: str, kernels: str, memory_format: str) -> None:
    data = load(name)
    assert set(data) == KEYS
    classifier = golden_classifier(data["flags"], kernels, memory_format).eval()
    x, t, y = tensor(data["x"]).requires_grad_(), tensor(data["t"]), tensor(data["y"])
    logits = classifier(x, t)
    assert_close(logits, data["logits"], TOLERANCE, "logits")
    log_probability = F.log_softmax(logits, dim=-1)[torch.arange(len(y)), y]
    assert_close(log_probability, data["log_probability"], TOLERANCE, "log p(y | x_t)")
    (gradient,) = torch.autograd.grad(log_probability.sum(), x, retain_graph=True)
    assert_close(gradient, data["grad_log_probability"], TOLERANCE, "grad log p(y | x_t)")
    loss = F.cross_entropy(logits, y)
    assert abs(loss.item() - data["cross_entropy"]) <= TOLERANCE * data["cross_entropy"]
    loss.backward()
    assert_gradients(classifier, data)
