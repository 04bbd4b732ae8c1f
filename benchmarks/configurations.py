"""Every launch in use: the kernel launches of the presets' models, forward and backward, recorded without a GPU.

``python -m fastdiff.benchmarks.configurations`` compiles them all and prints the registers and the memory they need.
"""

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from unittest.mock import patch

import torch
import triton

from fastdiff.benchmarks.ahead_of_time import TARGETS, Compiled, Program
from fastdiff.benchmarks.programs import TABLE, Figures, Key, differences, read, share_of_today, write
from fastdiff.benchmarks.shapes import AttentionShape, NormShape, preset_shapes
from fastdiff.kernels.attention import op as attention_op
from fastdiff.kernels.attention import plan as attention_plan
from fastdiff.kernels.backend import Backend
from fastdiff.kernels.diffusion_loss import op as loss_op
from fastdiff.kernels.diffusion_step import op as step_op
from fastdiff.kernels.gaussian import TABLES, LossType, ModelMeanType, ModelVarType, Sampler
from fastdiff.kernels.group_norm_silu import op as norm_op
from fastdiff.kernels.launch import recording

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
COLUMNS = "registers", "spills", "shared", "loads", "stores"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may use."""
MATRIX_UNITS_OF = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MAY_SPILL = {"group_norm_silu": 16}
"""Bytes per thread that an operation's kernels may spill. In the norm's, ptxas saves one to four registers before a
loop and restores them after it, to fit one more program on a multiprocessor; with ``maxnreg`` it would not."""
SHARE = 8
"""Programs of the table that a test run compiles again: about 7 s of one core."""
UPDATE = "python -m fastdiff.benchmarks.configurations --update"
BATCHES = [1, 2, 4, 8, 16, 64]  # from sampling one image to training


@dataclass(frozen=True)
class Configuration:
    """A program in use, the first workload that runs it, and the targets for which dispatch chooses it."""

    workload: str
    program: Program
    targets: tuple[str, ...]


def configurations(thorough: bool) -> list[Configuration]:
    """The configurations of all four operations, each program once: in bf16 and channels_last or, if ``thorough``, in
    every dtype and layout.
    """
    found: dict[object, Configuration] = {}
    for workload, run, targets in _workloads(thorough):
        with recording() as launches:
            run()
        for launch in launches:
            program = Program.of(launch)
            found.setdefault((program.key, targets), Configuration(workload, program, targets))
    return list(found.values())


Workload = tuple[str, Callable[[], object], tuple[str, ...]]


def _workloads(thorough: bool) -> Iterator[Workload]:
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if thorough else [torch.bfloat16]
    layouts = list(LAYOUTS) if thorough else ["channels_last"]
    norms, attentions = preset_shapes()
    for dtype, n, layout, shape in itertools.product(dtypes, BATCHES, layouts, norms):
        label = f"C{shape.channels} {shape.size}x{shape.size} N{n} {_short(dtype)} {layout}"
        yield f"norm {label}", partial(_norm, shape, n, dtype, LAYOUTS[layout]), tuple(TARGETS)
    for dtype, n, attended in itertools.product(dtypes, BATCHES, attentions):
        d = attended.channels // attended.heads
        if d <= 256 and dtype is not torch.float32:  # dispatch chooses SDPA for the others
            label = f"T{attended.tokens} H{attended.heads} d{d} N{n} {_short(dtype)}"
            for warpgroups, targets in ((True, ("sm_90", "sm_100")), (False, ("sm_80", "gfx942"))):
                yield f"attention {label}", partial(_attention, attended, n, dtype, warpgroups), targets
    for n, size, layout in itertools.product(BATCHES, (32, 64, 128, 256), layouts):
        label = f"{size}x{size} N{n} {layout}"
        for sampler, inside in itertools.product(("ddpm", "ddim"), (True, False)):
            yield f"{sampler} {label}", partial(_step, n, size, layout, sampler, inside), tuple(TARGETS)
        for loss_type in ("rescaled_mse", "rescaled_kl"):
            yield f"{loss_type} {label}", partial(_loss, n, size, layout, loss_type), tuple(TARGETS)


def _norm(shape: NormShape, n: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    size = (n, shape.channels, shape.size, shape.size)
    x = torch.empty(size, dtype=dtype, memory_format=memory_format).requires_grad_()
    weight, bias = torch.empty(2, shape.channels).requires_grad_().unbind(0)
    scale, shift = None, None
    if shape.conditioned:
        scale, shift = torch.empty(n, 2 * shape.channels, dtype=dtype).requires_grad_().chunk(2, dim=1)
    run = norm_op.IMPLEMENTATIONS[Backend.TRITON]
    y = run(x, weight, bias, 32, 1e-5, scale, shift, shape.silu)
    torch.autograd.grad(y, [t for t in (x, weight, bias, scale, shift) if t is not None], torch.empty_like(y))


def _attention(shape: AttentionShape, n: int, dtype: torch.dtype, warpgroups: bool) -> None:
    qkv = torch.empty(n, shape.tokens, 3 * shape.channels, dtype=dtype).requires_grad_()
    with patch.object(attention_plan, "WARPGROUPS_WITHOUT_A_GPU", warpgroups):
        y = attention_op.IMPLEMENTATIONS[Backend.TRITON](qkv, shape.heads)
        torch.autograd.grad(y, qkv, torch.empty_like(y))


def _step(n: int, size: int, layout: str, sampler: str, inside: bool) -> None:
    x, output, t, tables, noise = _process(n, size, layout)
    choices = ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE, Sampler(sampler)
    given = None if inside else noise
    step_op.IMPLEMENTATIONS[Backend.TRITON](
        x, output, t, tables, given, 1, None, *choices, float(sampler == "ddim"), True, False
    )


def _loss(n: int, size: int, layout: str, loss_type: str) -> None:
    x, output, t, tables, noise = _process(n, size, layout)
    output.requires_grad_()
    choices = ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE, LossType(loss_type)
    loss, *_ = loss_op.IMPLEMENTATIONS[Backend.TRITON](output, x, x, noise, t, tables, *choices)
    torch.autograd.grad(loss, output, torch.empty_like(loss))


def _process(n: int, size: int, layout: str) -> tuple[torch.Tensor, ...]:
    x, noise = (torch.empty(n, 3, size, size) for _ in range(2))
    output = torch.empty(n, 6, size, size, memory_format=LAYOUTS[layout])
    return x, output, torch.zeros(n, dtype=torch.int64), torch.empty(1000, len(TABLES)), noise


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


Job = tuple[Configuration, str]
"""A program, and the target that it is compiled for."""


def compile_all(jobs: list[Job]) -> Iterator[tuple[Configuration, Compiled]]:
    """Compile the jobs on all cores, and yield them in order."""
    # forked, because launches hold kernels and tensors that other start methods cannot pass on
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        _jobs[:] = jobs
        for (configuration, _), compiled in zip(jobs, pool.map(_compile, range(len(jobs)), chunksize=4), strict=True):
            yield configuration, compiled


_jobs: list[Job] = []


def _compile(index: int) -> Compiled:
    configuration, target = _jobs[index]
    return configuration.program.compile_for(target)


def faults(configuration: Configuration, built: Compiled) -> list[str]:
    """What is wrong with a compiled configuration, apart from the exceptions of MAY_SPILL."""
    found = []
    kernel = configuration.program.source.name
    if built.spills > max((size for op, size in MAY_SPILL.items() if kernel.startswith(op)), default=0):
        found.append(f"spills {built.spills} bytes")
    if built.shared > SHARED_LIMIT[built.target]:
        found.append(f"needs {built.shared} bytes of shared memory, more than {SHARED_LIMIT[built.target]}")
    long = configuration.workload.startswith("attention") and not configuration.workload.startswith("attention T16 ")
    if long and built.matrix_units != MATRIX_UNITS_OF[built.target]:
        found.append(f"multiplies matrices with {built.matrix_units or 'nothing'}, not {MATRIX_UNITS_OF[built.target]}")
    return found


def known_by(jobs: list[Job]) -> dict[Key, Job]:
    """The jobs by their keys in the table."""
    return {Key(c.program.fingerprint, target, triton.__version__): (c, target) for c, target in jobs}


def figures(configuration: Configuration, built: Compiled) -> Figures:
    """The figures of a compiled configuration in the table."""
    numbers = {f.name: getattr(built, f.name) for f in fields(Figures) if f.name not in ("kernel", "workload")}
    return Figures(configuration.program.name, configuration.workload, **numbers)


def show(
    compiled: Iterable[tuple[Configuration, Compiled]], kept: Mapping[Key, Figures]
) -> tuple[dict[Key, Figures], int]:
    """Print what each program needs and its faults. Returns the figures, and the number of programs with a fault.

    A program whose figures differ from the table's also has a fault.
    """
    layout = "{:39} {:48} {:7} {:>9} {:>6} {:>7} {:>8} {:>8}  {} {}"
    print(layout.format("kernel", "workload", "target", *COLUMNS, "matrix units", ""))
    found: dict[Key, Figures] = {}
    wrong = 0
    for configuration, built in compiled:
        (key,) = known_by([(configuration, built.target)])
        found[key] = figures(configuration, built)
        faults_of = [*faults(configuration, built), *(differences(found[key], kept[key]) if key in kept else [])]
        loads, stores = f"{built.wide_loads}/{built.loads}", f"{built.wide_stores}/{built.stores}"
        numbers = built.registers, built.spills, built.shared, loads, stores, built.matrix_units
        words = "; ".join(faults_of).upper()
        print(layout.format(configuration.program.name, configuration.workload, built.target, *numbers, words))
        wrong += bool(faults_of)
    print(f"{len(found)} programs compiled, {wrong} with a fault (loads and stores: those of 16 bytes / all)")
    return found, wrong


def check(jobs: list[Job]) -> bool:
    """Check the table against the programs in use: compile a share of the missing ones and of the rest, new ones daily.

    Returns False if a program has a fault, or if the table lacks programs of this Triton release or has unused ones. A
    release without any entry is checked by the share alone.
    """
    table, wanted = read(), known_by(jobs)
    kept = {key: figures for key, figures in table.items() if key.triton == triton.__version__}
    missing, unused = sorted(set(wanted) - set(kept)), set(kept) - set(wanted)
    chosen = share_of_today(missing, SHARE) + share_of_today(sorted(set(wanted) & set(kept)), SHARE)
    _, wrong = show(compile_all([wanted[key] for key in chosen]), kept)
    if not kept:
        print(f"{TABLE.name} has no programs of Triton {triton.__version__}: only these were compiled")
        return not wrong
    if missing or unused:
        print(f"{TABLE.name} lacks {len(missing)} programs and has {len(unused)} that are not in use: run {UPDATE}")
    return not (wrong or missing or unused)


def update(jobs: list[Job]) -> bool:
    """Update the table, compiling only what it lacks. If a program has a fault, write nothing and return False."""
    table, wanted = read(), known_by(jobs)
    kept = {key: table[key] for key in wanted if key in table}
    found, wrong = show(compile_all([job for key, job in wanted.items() if key not in kept]), kept)
    if not wrong:
        write(kept | found)
    return not wrong


def main() -> None:
    """Print what every configuration in use needs on every target; exit status 1 if one has a fault."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("targets", nargs="*", default=[], metavar="TARGET", help="default: all")
    parser.add_argument("--thorough", action="store_true", help="every dtype and layout, not only the default ones")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--check", action="store_true", help=f"check {TABLE.name} against them, in less than a minute")
    table.add_argument("--update", action="store_true", help=f"update {TABLE.name} to match them")
    arguments = parser.parse_args()
    targets = arguments.targets or list(TARGETS)
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"no target {unknown[0]}: {', '.join(TARGETS)}")
    if (arguments.check or arguments.update) and (arguments.targets or arguments.thorough):
        parser.error(f"{TABLE.name} has the default programs for all targets: give --check or --update alone")
    jobs = [(c, target) for c in configurations(arguments.thorough) for target in targets if target in c.targets]
    if arguments.check or arguments.update:
        sys.exit(not (check if arguments.check else update)(jobs))
    _, wrong = show(compile_all(jobs), {})
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
