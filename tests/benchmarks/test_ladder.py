"""The rungs: one change each, what the device cannot do left out, and weights that are the same for all."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from fastdiff.benchmarks import ladder as module
from fastdiff.benchmarks.ladder import PLAIN, Candidate, Models, Rung, as_asked, ladder
from fastdiff.config import Compile, Kernels, MemoryFormat, Precision, RuntimeConfig
from fastdiff.runtime import device as runtime_device
from fastdiff.runtime.device import Runtime

from .support import CPU, WORKLOAD

BF16 = RuntimeConfig(device="cpu", compile=Compile.OFF, precision=Precision.BF16)


@pytest.fixture(params=[True, False], ids=["able", "bare"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A machine with bf16 and a compiler, or without both."""
    monkeypatch.setattr(module, "has_native_bf16", lambda _: request.param)
    monkeypatch.setattr(runtime_device, "has_compiler", lambda _: request.param)
    return bool(request.param)


def differences(one: Rung, other: Rung) -> int:
    a, b = (dataclasses.asdict(rung.config) | dataclasses.asdict(rung) for rung in (one, other))
    return sum(a[name] != b[name] for name in a if name not in ("name", "config"))


@pytest.mark.parametrize("suite", ["unet", "train", "sample", "step"])
def test_each_rung_is_one_change_more(suite: str, able: bool) -> None:
    rungs = ladder(suite, CPU)
    assert rungs[0] == Rung("plain", dataclasses.replace(PLAIN, device="cpu"))
    assert [differences(*pair) for pair in itertools.pairwise(rungs)] == [1] * (len(rungs) - 1)
    names = ["plain", "+ channels_last", "+ torch kernels"]
    names += ["+ bf16"] * able + ["+ fused optimizer"] * (suite == "train")
    names += ["+ compile"] * able + ["trainer"] * (suite == "train")
    assert [rung.name for rung in rungs] == names


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize(("suite", "last"), [("unet", "+ beside the norms"), ("sample", "+ CUDA graph")])
def test_a_gpu_has_more_rungs(monkeypatch: pytest.MonkeyPatch, suite: str, last: str, tf32: bool) -> None:
    gpu = torch.device("cuda", 0)
    on_gpu = Runtime(gpu, Precision.BF16, Compile.ON, Kernels.AUTO, MemoryFormat.CHANNELS_LAST)
    monkeypatch.setattr(Runtime, "resolve", lambda *_: on_gpu)
    monkeypatch.setattr(module, "has_native_bf16", lambda _: True)
    monkeypatch.setattr(module, "has_tf32", lambda _: tf32)
    monkeypatch.setattr(module, "HAS_TRITON", True)
    rungs = ladder(suite, gpu)
    assert [differences(*pair) for pair in itertools.pairwise(rungs)] == [1] * (len(rungs) - 1)
    assert rungs[-1].name == last
    assert (rungs[-1].config.kernels, rungs[-1].beside) == (Kernels.AUTO, True)
    assert rungs[-1].graphs == (suite == "sample")
    assert [rung.name for rung in rungs[:3]] == ["plain", *["+ tf32"] * tf32, "+ channels_last", "+ torch kernels"][:3]
    assert [rung.name for rung in as_asked(suite, RuntimeConfig(), gpu)][:-1] == ["plain", *["+ tf32"] * tf32]


def test_what_is_asked_for_stands_beside_the_plain_path(able: bool) -> None:
    asked = RuntimeConfig(precision=Precision.FP32, memory_format=MemoryFormat.CONTIGUOUS)
    plain, ours = as_asked("train", asked, CPU)
    assert plain == ladder("train", CPU)[0]
    compiled = "compiled" if able else "eager"
    assert ours.name == f"asked: fp32, {compiled}, contiguous, kernels auto"
    assert ours.config.compile is (Compile.ON if able else Compile.OFF)
    assert (ours.fused, ours.graphs, ours.beside, ours.trainer) == (True, True, True, True)


def test_all_have_the_same_weights_and_training_keeps_fp32() -> None:
    models = Models(WORKLOAD)
    plain, cast, trained = models.inference(PLAIN), models.inference(BF16), models.training(BF16)
    assert {p.dtype for p in cast.module.parameters()} == {torch.float32, torch.bfloat16}
    assert not cast.module.training
    assert {p.dtype for p in trained.module.parameters()} == {torch.float32}
    assert trained.module.training
    for own, other in ((plain, cast), (models.training(PLAIN), trained)):  # their embedding layers differ
        for p, q in zip(own.module.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(p.to(q.dtype), q, rtol=0, atol=0)
            assert p.any()
    assert models.inference(BF16) is cast  # compiled once for all suites


def test_a_model_that_the_cast_changes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: Runtime, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
        return module

    monkeypatch.setattr(Runtime, "cast", doubled)
    with pytest.raises(ValueError, match=r"^differs from the plain path by .* in its output .*: not timed$"):
        Models(WORKLOAD).inference(BF16)


def test_a_wrong_gradient_is_refused() -> None:
    models = Models(WORKLOAD)
    right = models.training(BF16)

    def call(*args: torch.Tensor) -> torch.Tensor:
        output = right.call(*args)
        output.register_hook(lambda gradient: 2 * gradient)
        return output

    with pytest.raises(ValueError, match="in its gradient"):
        models.checked(Candidate(right.module, call, right.runtime))


@pytest.mark.parametrize("layer", ["qkv", "time_embed", "emb_layers"])
def test_a_layer_without_a_gradient_is_seen(layer: str) -> None:
    model = dataclasses.replace(WORKLOAD.model, channel_mult=(1, 1), attention_resolutions=(8,))
    models = Models(dataclasses.replace(WORKLOAD, model=model))
    right = models.training(BF16)
    found = [parameter for name, parameter in right.module.named_parameters() if layer in name]
    assert found
    for parameter in found:
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(ValueError, match=f"gradient of .*{layer}"):
        models.checked(right)


def test_dropout_is_no_difference() -> None:
    dropped = dataclasses.replace(WORKLOAD, model=dataclasses.replace(WORKLOAD.model, dropout=0.5))
    assert Models(dropped).training(PLAIN).module.training
