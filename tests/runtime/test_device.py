"""Where and how a model runs: what auto decides, what is refused, and that compiling changes no result."""

import pytest
import torch
from torch import nn

from fastdiff import ModelConfig, RuntimeConfig, build_model
from fastdiff.config import Compile, Precision
from fastdiff.runtime.device import COMPILE_PAYS_AFTER, Runtime, has_native_bf16, resolve_device, resolve_precision
from fastdiff.runtime.words import duration

CPU = torch.device("cpu")


def test_auto_precision_is_bf16_exactly_where_it_is_native() -> None:
    expected = Precision.BF16 if has_native_bf16(CPU) else Precision.FP32
    assert resolve_precision(Precision.AUTO, CPU) is expected
    assert resolve_precision(Precision.FP16, CPU) is Precision.FP16


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:x", "cuda:99"])
def test_devices_that_are_not_to_be_had_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        resolve_device(name)


def test_auto_compiles_long_jobs_only() -> None:
    runtime = Runtime.resolve(RuntimeConfig(device="cpu"))
    assert not runtime.compiles(COMPILE_PAYS_AFTER["cpu"] - 1)
    off = Runtime.resolve(RuntimeConfig(device="cpu", compile=Compile.OFF))
    assert not off.compiles(10**9)


def test_auto_without_a_compiler_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not Runtime.resolve(RuntimeConfig(device="cpu")).compiles(10**9)
    with pytest.raises(ValueError, match=r"compile on.*g\+\+"):
        Runtime.resolve(RuntimeConfig(device="cpu", compile=Compile.ON))


def test_autocast_covers_the_model_alone() -> None:
    runtime = Runtime.resolve(RuntimeConfig(device="cpu", precision=Precision.BF16, compile=Compile.OFF))
    linear = nn.Linear(2, 2)
    assert runtime.prepare(linear, calls=1)(torch.ones(1, 2)).dtype is torch.bfloat16
    assert linear(torch.ones(1, 2)).dtype is torch.float32


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(Precision.BF16, 3e-2), pytest.param(Precision.FP32, 1e-4, marks=pytest.mark.slow)],
)
def test_the_compiled_model_computes_the_same(precision: Precision, tolerance: float) -> None:
    """Every gradient too: Inductor once gave most of them as zero while the output was right."""
    config = ModelConfig(image_size=16, num_channels=64, num_res_blocks=1, channel_mult=(1, 2), class_cond=True)
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    x, t, y = torch.randn(3, 3, 16, 16), torch.tensor([1.0, 500.5, 999.0]), torch.tensor([0, 7, 999])
    found = []
    for compile in (Compile.OFF, Compile.ON):
        runtime = Runtime.resolve(RuntimeConfig(device="cpu", precision=precision, compile=compile))
        model.zero_grad()
        out = runtime.prepare(model, calls=1)(x, t, y=y)
        out.square().mean().backward()
        found.append({"output": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()})
    for name, eager in found[0].items():
        assert float((found[1][name] - eager).norm()) <= tolerance * float(eager.norm()), name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "1 min 30 s"), (3600 * 2 + 300, "2 h 5 min"), (86400 * 3 + 7200, "3 d 2 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
