"""Compile launches for GPUs that are not available, and read the resources that they use from the result."""

import ast
import hashlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdiff.kernels.launch import Launch

TARGETS: Mapping[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

MATRIX_UNITS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")

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
    loads: int  # instructions in the text that load global memory
    wide_loads: int  # those of 16 bytes
    stores: int
    wide_stores: int
    matrix_units: str  # the instruction that multiplies matrices, if there is one
    text: str  # PTX or AMDGCN assembly


def source(launch: Launch) -> ASTSource:
    """The launch's kernel, specialised as a launch does: ones become constants, multiples of 16 are declared."""
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


@dataclass(frozen=True)
class Program:
    """A kernel with its compile-time choices: all that a compiler needs, without a launch's tensors."""

    source: ASTSource
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, launch: Launch) -> Self:
        """The program that the launch runs."""
        return cls(source(launch), launch.num_warps, launch.num_stages)

    @property
    def name(self) -> str:
        """The kernel's name and its warps."""
        return f"{self.source.name} {self.num_warps}w"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for programs that compile to the same code."""
        return self.source.hash(), self.num_warps, self.num_stages

    @property
    def fingerprint(self) -> str:
        """A hash of the source and of all compile-time choices, independent of comments, docstrings and line numbers.

        Triton's key changes with every line that is added above a kernel.
        """
        source = self.source
        decided = sorted((str(key), str(value)) for key, value in source.constants.items())
        text = (_texts(source.fn), source.signature, decided, source.attrs, self.num_warps, self.num_stages)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:16]

    def compile_for(self, target: str) -> Compiled:
        """Compile for one of TARGETS and read what the result uses."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        built = triton.compile(self.source, target=TARGETS[target], options=options)
        found = _read_amd(built) if target.startswith("gfx") else _read_nvidia(built, target)
        if not found.loads:  # too much of Blackwell's tensor memory silently compiles to a trap
            raise ValueError(f"{self.name} for {target} reads nothing: the compiler gave up on it")
        return found


@cache
def _texts(function: JITFunction) -> tuple[str, ...]:
    """The source of a Triton function and of the functions that it calls, except Triton's."""
    found: dict[str, str] = {}
    waiting = [function]
    while waiting:
        function = waiting.pop()
        (tree,) = function.parse().body
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        found[f"{function.module}.{tree.name}"] = ast.unparse(tree)
        scope = {**function.fn.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        for node in ast.walk(tree):
            value = None
            if isinstance(node, ast.Name):
                value = scope.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(scope.get(node.value.id), node.attr, None)
            if isinstance(value, triton.language.constexpr):
                found[ast.unparse(node)] = repr(value.value)
            elif isinstance(value, JITFunction) and not value.module.startswith("triton"):
                waiting += [value] if f"{value.module}.{value.fn.__name__}" not in found else []
    return tuple(f"{name}: {text}" for name, text in sorted(found.items()))


def compile_for(launch: Launch, target: str) -> Compiled:
    """Compile the launch for one of TARGETS and read what it uses."""
    return Program.of(launch).compile_for(target)


def _read_nvidia(built: Any, target: str) -> Compiled:
    text = built.asm["ptx"]
    usage = _resource_usage(built.asm["cubin"])
    memory = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)\s", text)
    copies = [int(size, 0) for size in re.findall(r"\bcp\.async\.c\w\.shared\S* .*?, (0x\w+|\d+),? ", text)]
    wide = [kind for kind, width in memory if width in (".v4.b32", ".v2.b64")]
    kinds = [kind for kind, _ in memory]
    return Compiled(
        target=target,
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"],
        shared=built.metadata.shared,
        loads=kinds.count("ld") + len(copies),
        wide_loads=wide.count("ld") + copies.count(16),
        stores=kinds.count("st"),
        wide_stores=wide.count("st"),
        matrix_units=_matrix_units(text),
        text=text,
    )


def _read_amd(built: Any) -> Compiled:
    text = built.asm["amdgcn"]
    count = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    memory = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text)
    wide = [kind for kind, width in memory if width.startswith("dwordx4")]
    kinds = [kind for kind, _ in memory]
    return Compiled(
        target="gfx942",
        registers=count["vgpr_count"],
        spills=count["vgpr_spill_count"] + count["sgpr_spill_count"],
        shared=built.metadata.shared,
        loads=kinds.count("load"),
        wide_loads=wide.count("load"),
        stores=kinds.count("store"),
        wide_stores=wide.count("store"),
        matrix_units=_matrix_units(text),
        text=text,
    )


def _matrix_units(text: str) -> str:
    return next((name for name in MATRIX_UNITS if name in text), "")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and so on, from cuobjdump, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", run.stdout)}
