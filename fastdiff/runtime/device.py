"""The device and precision that a model runs with, decided once."""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.config import Compile, Kernels, MemoryFormat, Precision, RuntimeConfig
from fastdiff.runtime.memory import keep_freed_memory
from fastdiff.runtime.threads import load_average, usable_cores

M = TypeVar("M", bound=nn.Module)

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}

COMPILE_PAYS_AFTER = {"cuda": 200, "cpu": 2000}
"""Model calls after which torch.compile recovers the minutes that it takes with a cold cache."""
SHORTEST_COMPILED = {"cuda": 0.0, "cpu": 15 * 60.0}
"""Seconds from which a run of given length is compiled. Recipe auto's model for a CPU was compiled in 1.8 and in 2.9
minutes and then saved 22% and 15% of an update (two cores with AVX512-BF16, and with AVX2)."""

_ISAS_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ONEDNN_MAX_CPU_ISA under which oneDNN multiplies bf16 as fp32, after conversions that cost more than they
save (AVX2_VNNI_2 converts in hardware and multiplies in fp32)."""


@dataclass(frozen=True)
class Runtime:
    """A RuntimeConfig with every ``auto`` resolved for this machine."""

    device: torch.device
    precision: Precision
    compile: Compile
    kernels: Kernels
    memory_format: MemoryFormat

    @classmethod
    def resolve(cls, config: RuntimeConfig, local_rank: int | None = None) -> Self:
        """Resolve every ``auto``; ValueError if the machine does not support an explicit setting.

        ``local_rank`` is this process's local rank if there are several processes: each takes its own GPU.
        """
        device = resolve_device(config.device, local_rank)
        if device.type == "cpu":
            keep_freed_memory()
        elif device.index is not None:
            torch.cuda.set_device(device)
        precision = resolve_precision(config.precision, device)
        if device.type == "cuda":
            rounded = precision is Precision.TF32
            torch.set_float32_matmul_precision("high" if rounded else "highest")
            torch.backends.cudnn.allow_tf32 = rounded
        if config.compile is Compile.ON and not has_compiler(device):
            raise ValueError("compile on: torch.compile needs a C++ compiler (g++): install one, or use --compile off")
        return cls(device, precision, config.compile, config.kernels, config.memory_format)

    def autocast(self) -> AbstractContextManager[object]:
        """The context for the model's forward pass."""
        if self.precision in _DTYPES:
            return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])
        return nullcontext()

    def compiles(self, calls: int, seconds: float = math.inf) -> bool:
        """Whether a job that calls the model ``calls`` times, and may take so many seconds, compiles it."""
        if self.compile is Compile.AUTO:
            kind = self.device.type
            long = calls >= COMPILE_PAYS_AFTER[kind] and seconds >= SHORTEST_COMPILED[kind]
            return long and has_compiler(self.device)
        return self.compile is Compile.ON

    def prepare(self, model: nn.Module, calls: int) -> Callable[..., Tensor]:
        """The model as a function to call ``calls`` times: under autocast, and compiled if that pays off."""
        return self.eager(torch.compile(model, dynamic=False) if self.compiles(calls) else model)

    def eager(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The model as a function, under autocast."""

        def run(*args: Any, **kwargs: Any) -> Tensor:
            with self.autocast():
                return call(*args, **kwargs)

        return run

    def cast(self, model: M) -> M:
        """Cast the weights of convolutions and linear layers to the precision that ``autocast`` uses, in place.

        Outputs under autocast stay bit-identical, but for two roundings: of a convolution's bias that a norm's kernel
        adds, and of the two biases whose sum a residual block adds. The casts in every call are saved. For inference
        only.
        """
        if self.precision in _DTYPES:
            for module in model.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                    # PyTorch's matmul sums in another order if the weight requires a gradient; autocast's copy does not
                    module.to(_DTYPES[self.precision]).requires_grad_(False)
        return model

    def describe(self, calls: int) -> str:
        """One-line summary for the log."""
        compiled = "compiled" if self.compiles(calls) else "eager"
        return f"{self.device}, {self.precision}, {compiled}, {self.memory_format}, kernels {self.kernels}"


def compiling() -> str:
    """The line of a log before the first call of a model that is compiled: how long it takes on this machine now."""
    load, cores, slower = load_average(), usable_cores(), ""
    if load > cores:
        slower = f", about {1 + load / cores:.0f} times as long at the present load of {load:.1f} on {cores:g} cores"
    return f"compiling the model first: one to three minutes{slower}, or seconds if its cache is warm; Ctrl-C stops it"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute fp32 products and convolutions on GPUs in fp32, whatever Runtime.resolve chose."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA if available, else the CPU. ValueError if it is not available.

    If several processes share a machine, each takes the GPU with its local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"device {name}: each of several processes takes its own GPU; use --device cuda")
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank + 1} of this machine has no GPU: PyTorch sees {torch.cuda.device_count()}; start "
                "as many processes as there are GPUs (--nproc-per-node)"
            )
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # rejected below, like every other unsupported type
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs; use --device cpu or auto")
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolve ``auto`` to bf16 if the device supports it natively, else fp32; ValueError for unsupported precisions."""
    native = has_native_bf16(device)
    if precision is Precision.AUTO:
        return Precision.BF16 if native else Precision.FP32
    if precision is Precision.TF32 and device.type != "cuda":
        raise ValueError("precision tf32: only GPUs support it; use fp32 or bf16")
    if precision is Precision.BF16 and device.type == "cuda" and not native:
        raise ValueError("precision bf16: this GPU does not support it natively; use fp16 or fp32")
    return precision


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware and, on a CPU, oneDNN is allowed to use it."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    if limit.upper() in _ISAS_WITHOUT_BF16:
        return False
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older releases
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def has_compiler(device: torch.device) -> bool:
    """Whether the compiler that torch.compile needs on the device is installed."""
    # the compilers that Triton and Inductor look for
    name = os.environ.get("CC", "gcc") if device.type == "cuda" else os.environ.get("CXX", "g++")
    return shutil.which(name) is not None
