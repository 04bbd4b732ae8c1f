"""Compiling launches for GPUs that are not at hand, and reading from the result what they would use."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels.launch import Launch

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration, compiled for one target."""

    target: str
    registers: int  # per thread
    spills: int  # bytes of stack on CUDA, registers on ROCm
    shared: int  # bytes
    loads: int  # of global memory, instructions in the text
    wide_loads: int  # those of 16 bytes
    stores: int
    wide_stores: int
    tensor_cores: bool
    text: str  # PTX or AMDGCN assembly


def source(launch: Launch) -> ASTSource:
    """The launch's kernel specialised as a launch would: ones become constants, multiples of 16 are told."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments.get(parameter.name, parameter.default)
        plain = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (plain and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], multiple = "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], multiple = "fp32", False
        else:
            wide = not -(2**31) <= value < 2**31
            signature[name] = parameter.annotation_type or ("i64" if wide else "i32")
            multiple = plain and value % 16 == 0
        if multiple:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(launch: Launch, target: str) -> Compiled:
    """Compile the launch for one of TARGETS and read what it uses."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source(launch), target=TARGETS[target], options=options)
    if target == "gfx942":
        text = built.asm["amdgcn"]
        count = {key: int(value) for key, value in re.findall(r"\.(\w+_count|group_segment_fixed_size):\s+(\d+)", text)}
        registers, spills = count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]
        shared = count["group_segment_fixed_size"] or built.metadata.shared
        memory = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text)
        wide = [kind for kind, width in memory if width.startswith("dwordx4")]
        tensor_cores = "v_mfma" in text
        kinds = [kind for kind, _ in memory]
    else:
        text = built.asm["ptx"]
        usage = _resource_usage(built.asm["cubin"])
        registers, spills, shared = usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared
        memory = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)\s", text)
        copies = re.findall(r"\bcp\.async\.c\w\.shared\S* .*?, (0x\w+|\d+),? ", text)
        wide = [{"ld": "load", "st": "store"}[k] for k, width in memory if width in (".v4.b32", ".v2.b64")]
        wide += ["load"] * sum(int(size, 0) == 16 for size in copies)
        kinds = [{"ld": "load", "st": "store"}[k] for k, _ in memory] + ["load"] * len(copies)
        tensor_cores = any(name in text for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))
    return Compiled(
        target,
        registers,
        spills,
        shared,
        kinds.count("load"),
        wide.count("load"),
        kinds.count("store"),
        wide.count("store"),
        tensor_cores,
        text,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on, by cuobjdump, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", run.stdout)}
