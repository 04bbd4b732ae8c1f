"""``python -m tests.programs [TARGET ...]`` compiles every launch in use and prints its registers and memory."""

import argparse
import datetime
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import triton

from .launches import programs_in_use
from .program import TARGETS, Program
from .sources import launched, launched_directly
from .table import TABLE, TESTS, Figures, Key, operation_of, read, write

T = TypeVar("T")

MAY_SPILL = {"group_norm_silu": 8, "group_norm_silu_backward 8w": 64}
"""Bytes per thread that kernels may spill, by the beginning of their names. In some of the norm's ptxas saves
registers to fit one more program on a multiprocessor; those of 8 warps that spill have no loop."""
SHARE = 8
"""Programs of the table that a test run compiles again: about 7 s of one core."""
LISTED = 20
"""Most programs that the table lacks, or that are not in use, whose names are printed."""

Programs = Mapping[Key, Program]


def compile_all(programs: Programs) -> Iterator[tuple[Key, Figures]]:
    """Compile the programs on all cores, and yield them in order."""
    # forked, because programs hold kernels that other start methods cannot pass on
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        _jobs[:] = [(program, key.target) for key, program in programs.items()]
        yield from zip(programs, pool.map(_compile, range(len(_jobs)), chunksize=4), strict=True)


_jobs: list[tuple[Program, str]] = []


def _compile(index: int) -> Figures:
    program, target = _jobs[index]
    return program.compile_for(target)


def may_spill(kernel: str) -> int:
    """Bytes per thread that a kernel of this name may spill."""
    return max((size for name, size in MAY_SPILL.items() if kernel.startswith(name)), default=0)


def faults(target: str, built: Figures) -> list[str]:
    """What is wrong with a compiled program, apart from the exceptions of MAY_SPILL."""
    found = []
    limit, units = TARGETS[target].shared_limit, TARGETS[target].matrix_units
    if built.spills > may_spill(built.kernel):
        found.append(f"spills {built.spills} bytes")
    if built.shared > limit:
        found.append(f"needs {built.shared} bytes of shared memory, more than {limit}")
    long = built.workload.startswith("attention") and not built.workload.startswith("attention T16 ")
    if long and built.matrix_units != units:
        found.append(f"multiplies matrices with {built.matrix_units or 'nothing'}, not {units}")
    if not operation_of(built.kernel):
        found.append("has no tests in table.py")
    return found


def show(compiled: Iterable[tuple[Key, Figures]], kept: Mapping[Key, Figures]) -> tuple[dict[Key, Figures], int]:
    """Print what each program needs and its faults. Returns the figures, and the number of programs with a fault.

    A program whose figures differ from the table's also has a fault.
    """
    layout = "{:39} {:48} {:7} {:>9} {:>6} {:>7} {:>8} {:>8} {:>8}  {} {}"
    columns = "registers", "spills", "shared", "resident", "loads", "stores", "matrix units"
    print(layout.format("kernel", "workload", "target", *columns, ""))
    found: dict[Key, Figures] = {}
    wrong = 0
    for key, built in compiled:
        found[key] = built
        faults_of = [*faults(key.target, built), *(built.differences(kept[key]) if key in kept else [])]
        loads, stores = f"{built.wide_loads}/{built.loads}", f"{built.wide_stores}/{built.stores}"
        numbers = built.registers, built.spills, built.shared, built.resident, loads, stores, built.matrix_units
        print(layout.format(built.kernel, built.workload, key.target, *numbers, "; ".join(faults_of).upper()))
        wrong += bool(faults_of)
    counts = Counter(operation_of(built.kernel) for built in found.values())
    for operation, tests in TESTS.items():
        if counts[operation]:
            print(f"{operation}: {counts[operation]} programs, held by {', '.join(tests)}")
    print(
        f"{len(found)} programs compiled, {wrong} with a fault "
        "(resident: programs per multiprocessor; loads and stores: those of 16 bytes / all)"
    )
    return found, wrong


def share_of_today(items: Sequence[T], size: int, day: int | None = None) -> list[T]:
    """About ``size`` of the items, different ones every day, until all of them have been chosen."""
    parts = max(len(items) // size, 1)
    return list(items[(datetime.date.today().toordinal() if day is None else day) % parts :: parts])


def check(programs: Programs) -> bool:
    """Check the table against the programs in use: compile a share of the missing ones and of the rest, new ones daily.

    Returns False if a program has a fault, if the table lacks programs of this Triton release or has unused ones, or if
    the sources launch a kernel of which it has none. A release without any entry is checked by the share alone.
    """
    kept = {key: figures for key, figures in read().items() if key.triton == triton.__version__}
    missing, unused = sorted(programs.keys() - kept), kept.keys() - programs
    chosen = share_of_today(missing, SHARE) + share_of_today(sorted(programs.keys() & kept), SHARE)
    _, wrong = show(compile_all({key: programs[key] for key in chosen}), kept)
    if not kept:
        print(f"{TABLE.name} has no programs of Triton {triton.__version__}: only these were compiled")
        return not wrong
    names = [f"lacks {programs[key].name} {programs[key].workload} {key.target}" for key in missing]
    names += [
        f"has {kept[key].kernel} {kept[key].workload} {key.target}, which is not in use" for key in sorted(unused)
    ]
    print("".join(f"{TABLE.name} {name}\n" for name in names[:LISTED]), end="")
    if names:
        print(
            f"{TABLE.name} lacks {len(missing)} programs and has {len(unused)} that are not in use: "
            "run python -m tests.programs --update"
        )
    unknown = launched() - {figures.kernel.split()[0] for figures in kept.values()} | launched_directly()
    for kernel in sorted(unknown):
        print(
            f"{kernel} is launched, but {TABLE.name} has no program of it: no preset's model runs it through launch()"
        )
    return not (wrong or names or unknown)


def update(programs: Programs) -> bool:
    """Update the table, compiling only what it lacks. If a program has a fault, write nothing and return False."""
    table = read()
    kept = {key: table[key] for key in programs if key in table}
    found, wrong = show(compile_all({key: program for key, program in programs.items() if key not in kept}), kept)
    if not wrong:
        write(kept | found)
    return not wrong


def main() -> None:
    """Print what every program in use needs on every target; exit status 1 if one has a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=main.__doc__)
    parser.add_argument("targets", nargs="*", default=[], metavar="TARGET", help="default: all")
    parser.add_argument("--thorough", action="store_true", help="every dtype and layout, not only the default ones")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--check", action="store_true", help=f"check {TABLE.name} against them, in less than a minute")
    table.add_argument("--update", action="store_true", help=f"update {TABLE.name} to match them")
    arguments = parser.parse_args()
    if unknown := [target for target in arguments.targets if target not in TARGETS]:
        parser.error(f"no target {unknown[0]}: {', '.join(TARGETS)}")
    if (arguments.check or arguments.update) and (arguments.targets or arguments.thorough):
        parser.error(f"{TABLE.name} has the default programs for all targets: give --check or --update alone")
    programs = programs_in_use(arguments.thorough, arguments.targets or list(TARGETS))
    if arguments.check or arguments.update:
        sys.exit(not (check if arguments.check else update)(programs))
    _, wrong = show(compile_all(programs), {})
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
