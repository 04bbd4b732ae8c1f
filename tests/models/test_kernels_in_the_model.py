"""The UNet with the Triton kernels (interpreted where there is no GPU) is the UNet: outputs, gradients, compilation."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastdiff.models import UNet, blocks

from ..support import gradients, inputs
from .support import ONE_LEVEL, assert_near, small_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "learned variance, by class": {"learn_sigma": True, "class_cond": True, "num_classes": 5},
    "added embedding": {"use_scale_shift_norm": False},
    "super-resolution": {"small_size": 4},
    "recomputing": {"use_checkpoint": True},
}


@pytest.fixture(autouse=True)
def bias_in_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of maps as small as those of the tests, too."""
    monkeypatch.setattr(blocks, "BIAS_IN_NORM", 1)


def case(kernels: str, memory_format: str = "channels_last", **changes: Any) -> tuple[UNet, dict[str, Tensor]]:
    model = small_model(kernels, memory_format, **changes)
    return model.to(DEVICE), {name: value.to(DEVICE) for name, value in inputs(model).items()}


@pytest.mark.parametrize(
    ("variant", "memory_format"),
    [*((variant, "channels_last") for variant in VARIANTS if variant != "recomputing"), ("recomputing", "contiguous")],
)
def test_outputs_and_gradients(variant: str, memory_format: str) -> None:
    model, given = case("triton", memory_format, **VARIANTS[variant])
    reference, _ = case("reference", memory_format, **VARIANTS[variant])
    assert model.state_dict().keys() == reference.state_dict().keys()
    found = gradients(model, given)
    assert_near(found, gradients(reference, given), 1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BIAS_IN_NORM", 64)  # the convolution adds it
        assert_near(gradients(model, given), found, 1e-5)
        blocks.set_fuses(model, False)
        assert_near(gradients(model, given), found, 1e-5)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_every_block_keeps_the_layout(memory_format: str) -> None:
    model, given = case("triton", memory_format)
    wanted = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
    with torch.no_grad():
        features = model.eval().get_feature_vectors(**given)
    for h in (*features["down"], features["middle"], *features["up"]):
        assert h.is_contiguous(memory_format=wanted)


@pytest.mark.slow
def test_two_runs_give_equal_bits() -> None:
    model, given = case("triton", learn_sigma=True)
    (out, grads), (out_again, grads_again) = (gradients(model, given) for _ in range(2))
    assert torch.equal(out_again, out)
    assert all(torch.equal(grads_again[name], value) for name, value in grads.items())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_is_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    level = {} if backend == "inductor" else ONE_LEVEL
    model, given = case("triton", use_checkpoint=True, **VARIANTS["learned variance, by class"], **level)
    expected = gradients(model, given)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    assert_near(gradients(model, given, compiled), expected, 1e-4)
    given["timesteps"] = given["timesteps"] - 1.5
    compiled(**given)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_sampling_is_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    level = {} if backend == "inductor" else ONE_LEVEL
    model, given = case("triton", learn_sigma=True, **level)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for t in (999.0, 500.25):
            given["timesteps"] = torch.full((2,), t, device=DEVICE)
            torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
