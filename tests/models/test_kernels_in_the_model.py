"""The UNet with the Triton kernels (interpreted where there is no GPU) is the UNet: outputs, gradients, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.models import UNet

from .support import inputs, small_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "learned variance, by class": {"learn_sigma": True, "class_cond": True, "num_classes": 5},
    "added embedding": {"use_scale_shift_norm": False},
    "super-resolution": {"small_size": 4},
    "recomputing": {"use_checkpoint": True},
}


def case(kernels: str, memory_format: str = "channels_last", **changes: Any) -> tuple[UNet, dict[str, Tensor]]:
    model = small_model(kernels, memory_format, **changes)
    return model.to(DEVICE), {name: value.to(DEVICE) for name, value in inputs(model).items()}


def results(call: Callable[..., Tensor], model: UNet, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = call(**given)
    out.square().mean().backward()
    return {"out": out.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize(
    ("variant", "memory_format"),
    [*((variant, "channels_last") for variant in VARIANTS), ("added embedding", "contiguous")],
)
def test_outputs_and_gradients(variant: str, memory_format: str) -> None:
    model, given = case("triton", memory_format, **VARIANTS[variant])
    reference, _ = case("reference", memory_format, **VARIANTS[variant])
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert_near(results(model, model, given), results(reference, reference, given), 1e-4)


def test_two_runs_give_equal_bits() -> None:
    model, given = case("triton", learn_sigma=True)
    first, second = results(model, model, given), results(model, model, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", ["learned variance, by class", "recomputing"])
def test_training_is_one_graph(variant: str, backend: str) -> None:
    torch._dynamo.reset()
    model, given = case("triton", **VARIANTS[variant])
    expected = results(model, model, given)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    assert_near(results(compiled, model, given), expected, 1e-4)
    given["timesteps"] = given["timesteps"] - 1.5
    results(compiled, model, given)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.timeout(600)
def test_sampling_is_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model, given = case("triton", learn_sigma=True)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for t in (999.0, 500.25, 0.0):
            given["timesteps"] = torch.full((2,), t, device=DEVICE)
            torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
