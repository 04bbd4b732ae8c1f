"""Where a model runs and in which arithmetic, decided once."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastdiff.config import Compile, Kernels, MemoryFormat, Precision, RuntimeConfig
from fastdiff.runtime.memory import keep_freed_memory

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}

COMPILE_PAYS_AFTER = {"cuda": 200, "cpu": 2000}
"""Calls of the model that win back the minute or two which torch.compile takes when its cache is cold."""


@dataclass(frozen=True)
class Runtime:
    """A RuntimeConfig with every ``auto`` decided for this machine."""

    device: torch.device
    precision: Precision
    compile: Compile
    kernels: Kernels
    memory_format: MemoryFormat

    @classmethod
    def resolve(cls, config: RuntimeConfig) -> Self:
        """Decide; ValueError where the machine cannot do what is asked for by name."""
        device = resolve_device(config.device)
        if device.type == "cpu":
            keep_freed_memory()
        precision = resolve_precision(config.precision, device)
        if config.compile is Compile.ON and not _has_compiler(device):
            raise ValueError("compile on: torch.compile needs a C++ compiler (g++): install one, or use --compile off")
        return cls(device, precision, config.compile, config.kernels, config.memory_format)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the model's forward pass runs."""
        if self.precision in _DTYPES:
            return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])
        return nullcontext()

    def compiles(self, calls: int) -> bool:
        """Whether a job of so many calls of the model compiles it."""
        if self.compile is Compile.AUTO:
            return _has_compiler(self.device) and calls >= COMPILE_PAYS_AFTER[self.device.type]
        return self.compile is Compile.ON

    def prepare(self, model: nn.Module, calls: int) -> Callable[..., Tensor]:
        """The model as a function to call ``calls`` times: under autocast, and compiled where that pays."""
        call = torch.compile(model, dynamic=False) if self.compiles(calls) else model

        def run(*args: Any, **kwargs: Any) -> Tensor:
            with self.autocast():
                return call(*args, **kwargs)

        return run

    def describe(self, calls: int) -> str:
        """In words, for a log."""
        compiled = "compiled" if self.compiles(calls) else "eager"
        return f"{self.device}, {self.precision}, {compiled}, {self.memory_format}, kernels {self.kernels}"


def resolve_device(name: str) -> torch.device:
    """The device called ``name``, ``auto`` being CUDA where there is one; ValueError where it is not to be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # refused below, like any other that is no place to run
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs; use --device cpu or auto")
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """``auto`` as bf16 where the device does it natively, else fp32; ValueError where it cannot do what is asked."""
    native = has_native_bf16(device)
    if precision is Precision.AUTO:
        return Precision.BF16 if native else Precision.FP32
    if precision is Precision.BF16 and device.type == "cuda" and not native:
        raise ValueError("precision bf16: this GPU does not do it natively; use fp16 or fp32")
    return precision


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases have none
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def _has_compiler(device: torch.device) -> bool:
    # what Triton and Inductor look for
    name = os.environ.get("CC", "gcc") if device.type == "cuda" else os.environ.get("CXX", "g++")
    return shutil.which(name) is not None
