"""The benchmark's sampling: as the engine samples, on a copy of what is trained."""

import pytest
import torch
from torch import nn

from fastdiff.benchmarks.suites import Workload, candidates, step_suite
from fastdiff.config import Compile, DiffusionConfig, ModelConfig, Precision, RuntimeConfig
from fastdiff.runtime.device import Runtime

WORKLOAD = Workload(
    ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), learn_sigma=True),
    DiffusionConfig(diffusion_steps=3, noise_schedule="cosine", learn_sigma=True),
    2,
    torch.device("cpu"),
)
BF16 = RuntimeConfig(device="cpu", compile=Compile.OFF, precision=Precision.BF16)


def test_weights_are_cast_on_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cast, seen = Runtime.cast, []
    monkeypatch.setattr(Runtime, "cast", lambda self, module: seen.append(module) or cast(self, module))
    found = candidates(WORKLOAD, BF16)
    for name in ("plain", "fastdiff, eager"):
        found[name].for_sampling(WORKLOAD)
        assert {p.dtype for p in found[name].module.parameters()} == {torch.float32}
    dtypes = [{p.dtype for p in module.parameters()} for module in seen]
    assert dtypes == [{torch.float32}, {torch.float32, torch.bfloat16}]
    assert not seen[1].training


def test_a_model_that_the_cast_changes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: Runtime, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
        return module

    found = candidates(WORKLOAD, BF16)
    monkeypatch.setattr(Runtime, "cast", doubled)
    with pytest.raises(ValueError, match=r"^the model with its weights cast differs from itself by .*: not timed$"):
        found["fastdiff, eager"].for_sampling(WORKLOAD)


def test_a_step_is_measured_beside_the_call_that_it_makes() -> None:
    suite = step_suite(WORKLOAD, candidates(WORKLOAD, BF16))
    assert list(suite) == ["model call", "model call and step"]
    assert suite["model call"]().shape == (2, 6, 8, 8)  # type: ignore[attr-defined]
    for _ in range(4):  # one more than the process has
        suite["model call and step"]()
