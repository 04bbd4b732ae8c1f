"""The table of compiled programs, programs.csv: what every launch in use needs on every target.

A program is identified by its fingerprint, a hash of its source and of all compile-time choices. Its figures belong to
one release of Triton. An unchanged program need not be compiled again to know that it does not spill.
"""

import csv
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("programs.csv")
TESTS = {
    "attention": ("tests/kernels/test_attention_triton.py", "tests/kernels/test_every_kernel.py"),
    "diffusion_loss": ("tests/kernels/test_diffusion_loss.py", "tests/kernels/test_every_kernel.py"),
    "diffusion_step": ("tests/kernels/test_diffusion_step.py", "tests/kernels/test_every_kernel.py"),
    "group_norm_silu": (
        "tests/kernels/test_group_norm_silu.py",
        "tests/kernels/test_group_norm_silu_full.py",
        "tests/kernels/test_every_kernel.py",
    ),
    "philox": ("tests/kernels/test_philox.py", "tests/kernels/test_every_kernel.py"),
}
"""The tests of each operation, with whose name those of its kernels begin."""


def operation_of(kernel: str) -> str:
    """The operation of TESTS that a kernel belongs to, or an empty string."""
    return next((operation for operation in TESTS if kernel.startswith(operation)), "")


class Key(NamedTuple):
    """What determines the figures of a compiled program."""

    fingerprint: str
    target: str
    triton: str


class Figures(NamedTuple):
    """What a compiled program needs, and the first workload that runs it.

    Loads and stores are instructions on global memory, the wide ones those of 16 bytes.
    """

    kernel: str  # and its warps
    workload: str
    registers: int  # per thread
    spills: int  # bytes of stack on CUDA, registers on ROCm
    shared: int  # bytes
    resident: int  # programs per multiprocessor by these three and the warps
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    matrix_units: str  # the instruction that multiplies matrices, if there is one

    def differences(self, kept: "Figures") -> list[str]:
        """The figures that differ from the table's, as text."""
        compared = zip(self._fields, self, kept, strict=True)
        return [f"{name} {own}, not {other}" for name, own, other in compared if own != other and name != "workload"]


def read() -> dict[Key, Figures]:
    """The table; empty if there is no file."""
    if not TABLE.exists():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return {Key(*row[:3]): Figures(*row[3:5], *map(int, row[5:-1]), row[-1]) for row in rows}


def write(table: Mapping[Key, Figures]) -> None:
    """Write the table, sorted by kernel, workload and target."""
    columns = Key._fields + Figures._fields
    by = [columns.index(name) for name in ("kernel", "workload", "target", "fingerprint")]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(columns)
        out.writerows(sorted((key + figures for key, figures in table.items()), key=itemgetter(*by)))
