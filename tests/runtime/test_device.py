"""Where and how a model runs: what auto decides, what is refused, and that compiling changes no result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fastdiff import ClassifierConfig, ModelConfig, RuntimeConfig, build_classifier, build_model
from fastdiff.config import Compile, Precision
from fastdiff.models.layers import Conv3x3, GroupNormSiLU, Upsample
from fastdiff.runtime import device
from fastdiff.runtime.device import (
    COMPILE_PAYS_AFTER,
    Runtime,
    compiling,
    has_compiler,
    has_native_bf16,
    resolve_device,
    resolve_precision,
)
from fastdiff.runtime.words import duration

from ..numerics import relative
from ..support import gradients, inputs, randomise

CPU = torch.device("cpu")


def test_auto_precision_is_bf16_exactly_where_it_is_native() -> None:
    expected = Precision.BF16 if has_native_bf16(CPU) else Precision.FP32
    assert resolve_precision(Precision.AUTO, CPU) is expected
    assert resolve_precision(Precision.FP16, CPU) is Precision.FP16


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:x", "cuda:99"])
def test_devices_that_are_not_to_be_had_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        resolve_device(name)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_each_process_of_a_machine_takes_the_gpu_of_its_number() -> None:
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda")
        assert [resolve_device(name, local_rank) for local_rank in (0, 1)] == [
            torch.device("cuda:0"),
            torch.device("cuda:1"),
        ]
    assert resolve_device("cuda:1") == torch.device("cuda:1")  # alone it may be any
    assert resolve_device("cpu", 7) == CPU


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("local_rank", [0, 1])
def test_several_processes_cannot_share_a_gpu(local_rank: int) -> None:
    with pytest.raises(ValueError, match=r"^device cuda:1: each of several processes .*use --device cuda$"):
        resolve_device("cuda:1", local_rank)


@pytest.mark.usefixtures("two_gpus")
def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^process 3 of this machine has no GPU: PyTorch sees 2; .*--nproc-per-node"):
        resolve_device("auto", 2)


@pytest.mark.usefixtures("two_gpus")
def test_the_gpu_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every process would hold memory of the first GPU as well."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, matmul in ((Precision.TF32, "high"), (Precision.FP32, "highest"), (Precision.AUTO, "highest")):
            runtime = Runtime.resolve(RuntimeConfig(device="cuda", precision=precision, compile=Compile.OFF), 1)
            assert runtime.device == torch.device("cuda:1")
            assert runtime.precision is (Precision.BF16 if precision is Precision.AUTO else precision)
            assert torch.get_float32_matmul_precision() == matmul
            assert torch.backends.cudnn.allow_tf32 is (precision is Precision.TF32)
    finally:
        torch.set_float32_matmul_precision(before)
    assert chosen == [torch.device("cuda:1")] * 3


def test_precisions_that_a_device_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^precision tf32: only GPUs support it; use fp32 or bf16$"):
        resolve_precision(Precision.TF32, CPU)
    with pytest.raises(ValueError, match="tf32"):
        Runtime.resolve(RuntimeConfig(device="cpu", precision=Precision.TF32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda:0")
    assert resolve_precision(Precision.TF32, gpu) is Precision.TF32
    if torch.version.hip is None:
        with pytest.raises(ValueError, match="precision bf16: this GPU does not"):
            resolve_precision(Precision.BF16, gpu)
        assert resolve_precision(Precision.AUTO, gpu) is Precision.FP32


@pytest.mark.parametrize(
    ("limit", "native"),
    [("", True), ("AVX512_CORE", False), ("avx2", False), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", True)],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bf16_is_native_only_where_onednn_may_use_it(
    variable: str, limit: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setenv(variable, limit)
    assert has_native_bf16(CPU) == native
    assert resolve_precision(Precision.AUTO, CPU) is (Precision.BF16 if native else Precision.FP32)


def test_auto_compiles_long_jobs_only() -> None:
    runtime = Runtime.resolve(RuntimeConfig(device="cpu"))
    enough = COMPILE_PAYS_AFTER["cpu"]
    assert not runtime.compiles(enough - 1)
    assert not runtime.compiles(enough, seconds=600)
    assert runtime.compiles(enough) == runtime.compiles(enough, seconds=900) == has_compiler(CPU)
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


def assert_compiled_is_eager(
    model: nn.Module, given: dict[str, Tensor], precision: Precision, tolerance: float
) -> None:
    """The output and every gradient: Inductor once gave most of them as zero while the output was right."""
    found = []
    for compile in (Compile.OFF, Compile.ON):
        runtime = Runtime.resolve(RuntimeConfig(device="cpu", precision=precision, compile=compile))
        out, grads = gradients(model, given, runtime.prepare(model, calls=1))
        found.append({"output": out} | grads)
    for name, eager in found[0].items():
        assert relative(found[1][name], eager) <= tolerance, name


@pytest.mark.slow
def test_what_lies_below_an_upsampling_has_its_gradient_compiled_for_bf16() -> None:
    """The smallest of models in which interpolate loses it (PyTorch 2.13; see repeat_pixels)."""
    layers = Conv3x3(3, 64), Upsample(64), GroupNormSiLU(64, "auto"), Conv3x3(64, 3)
    model = randomise(nn.Sequential(*layers), seed=0, std=None).to(memory_format=torch.channels_last)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_compiled_is_eager(model, {"input": x}, Precision.BF16, 3e-2)


# At 32 channels a group of a norm is one channel: a bias before it has the gradient 0, of which rounding is left.
PLAIN = ModelConfig(image_size=8, num_channels=64, num_res_blocks=1, channel_mult=(1, 2), class_cond=True)
CLASSIFIER = ClassifierConfig(
    image_size=8,
    classifier_width=64,
    classifier_depth=1,
    classifier_attention_resolutions=(4,),
    channel_mult=(1, 2),
    num_classes=5,
)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.BF16, 3e-2), (Precision.FP32, 1e-4)])
@pytest.mark.parametrize("config", [PLAIN, replace(PLAIN, resblock_updown=True), CLASSIFIER])
def test_the_compiled_model_computes_the_same(
    config: ModelConfig | ClassifierConfig, precision: Precision, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = build_classifier(config) if isinstance(config, ClassifierConfig) else build_model(config)
    assert_compiled_is_eager(randomise(model, std=None), inputs(model, 3), precision, tolerance)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "1 min 30 s"), (3600 * 2 + 300, "2 h 5 min"), (86400 * 3 + 7200, "3 d 2 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("load", "slower"), [(0.0, ""), (2.0, ""), (6.2, ", about 4 times as long at the present load")]
)
def test_a_compilation_says_how_long_it_takes(load: float, slower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "load_average", lambda: load)
    monkeypatch.setattr(device, "usable_cores", lambda: 2)
    assert compiling().startswith(f"compiling the model first: one to three minutes{slower}")
