"""A compiled program: compile it for a GPU that is not available, and read what it uses from the result."""

import ast
import hashlib
import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdiff.kernels.launch import Launch

from .occupancy import resident
from .table import Figures


class Target(NamedTuple):
    """A GPU to compile for."""

    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one program may use
    matrix_units: str  # the instruction that multiplies matrices


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, "wgmma.mma_async"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, "tcgen05.mma"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
}

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
"""Triton's names of the dtypes in use."""


@dataclass(frozen=True)
class Program:
    """A kernel with its compile-time choices: all that a compiler needs, without a launch's tensors."""

    source: ASTSource
    num_warps: int
    num_stages: int
    workload: str = ""  # the first that runs it
    maxnreg: int | None = None

    @classmethod
    def of(cls, launch: Launch, workload: str) -> Self:
        """A launch's program, specialised as the launch does: ones become constants, multiples of 16 are declared."""
        kernel = launch.kernel
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[tuple[int, ...], list[list[object]]] = {}

        def typed(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
            """The type of an argument, or of one in a tuple; notes what is constant or a multiple of 16."""
            plain = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (plain and value == 1):
                constants[parameter.name if len(path) == 1 else path] = value
                return "constexpr"
            if isinstance(value, tuple):
                return type(value)(*(typed(part, (*path, i), parameter) for i, part in enumerate(value)))
            if isinstance(value, torch.Tensor):
                kind, multiple = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                kind, multiple = "fp32", False
            else:
                wide = not -(2**31) <= value < 2**31
                kind = parameter.annotation_type or ("i64" if wide else "i32")
                multiple = plain and value % 16 == 0
            if multiple:
                attributes[path] = [["tt.divisibility", 16]]
            return kind

        for index, parameter in enumerate(kernel.params):
            value = launch.arguments.get(parameter.name, parameter.default)
            signature[parameter.name] = typed(value, (index,), parameter)
        source = ASTSource(kernel, signature, constants, attributes)
        return cls(source, launch.num_warps, launch.num_stages, workload, launch.maxnreg)

    @property
    def name(self) -> str:
        """Of the kernel, and its warps."""
        return f"{self.source.name} {self.num_warps}w"

    @property
    def fingerprint(self) -> str:
        """A hash of the source and of all compile-time choices, independent of comments, docstrings and line numbers.

        Triton's key changes with every line that is added above a kernel.
        """
        source = self.source
        decided = sorted((str(key), str(value)) for key, value in source.constants.items())
        choices = self.num_warps, self.num_stages, *([] if self.maxnreg is None else [self.maxnreg])
        text = (_texts(source.fn), source.signature, decided, source.attrs, *choices)
        return hashlib.sha256(repr(text).encode()).hexdigest()[:16]

    def built_for(self, target: str) -> Any:
        """The program, compiled for one of TARGETS."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None and not target.startswith("gfx"):
            options["maxnreg"] = self.maxnreg
        return triton.compile(self.source, target=TARGETS[target].gpu, options=options)

    def compile_for(self, target: str) -> Figures:
        """Compile for one of TARGETS and read what the result uses."""
        built = self.built_for(target)
        text, registers, spills, accesses = _read_amd(built) if target.startswith("gfx") else _read_nvidia(built)
        loads, stores = ([wide for access, wide in accesses if access == kind] for kind in ("load", "store"))
        if not stores:  # too much of Blackwell's tensor memory silently compiles to a trap
            raise ValueError(f"{self.name} for {target} writes nothing: the compiler gave up on it")
        shared = built.metadata.shared
        together = resident(target, registers, shared, self.num_warps)
        memory = registers, spills, shared, together, len(loads), sum(loads), len(stores), sum(stores)
        newest_first = [target.matrix_units for target in reversed(TARGETS.values())]
        return Figures(self.name, self.workload, *memory, next((units for units in newest_first if units in text), ""))


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


Accesses = list[tuple[str, bool]]
"""Instructions on global memory: "load" or "store", and whether of 16 bytes."""


def _read_nvidia(built: Any) -> tuple[str, int, int, Accesses]:
    """PTX, registers, spills and accesses."""
    text, tool = built.asm["ptx"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)", run.stdout)}
    memory = re.findall(r"\b(ld|st)\.global\S*?((?:\.v\d)?\.b\d+)\s", text)
    accesses = [({"ld": "load", "st": "store"}[kind], width in (".v4.b32", ".v2.b64")) for kind, width in memory]
    copies = re.findall(r"\bcp\.async\.c\w\.shared\S* .*?, (0x\w+|\d+),? ", text)
    accesses += [("load", int(size, 0) == 16) for size in copies]
    return text, usage["REG"], usage["STACK"] + usage["LOCAL"], accesses


def _read_amd(built: Any) -> tuple[str, int, int, Accesses]:
    """Assembly, registers, spills and accesses."""
    text = built.asm["amdgcn"]
    count = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    memory = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text)
    accesses = [(kind, width.startswith("dwordx4")) for kind, width in memory]
    return text, count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"], accesses
