"""``python -m tests.programs.instructions`` counts the instructions of the programs that the cost model describes.

These are the benchmark's norms, steps and losses, and the norms of ImageNet's 64-pixel model, all of one input, and
without an input bias or the input beside the output, as they were measured. The counts are read from the machine code
for sm_90; ``benchmarks/results/compiled.csv`` keeps them beside those of kernels that were measured.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from fastdiff.benchmarks.cases import GPU_IMAGES, GPU_NORMS, LAYOUTS
from fastdiff.benchmarks.compiled import PRESENT, TABLE, Compiled, read, write
from fastdiff.benchmarks.flops import Flops
from fastdiff.config import ModelConfig
from fastdiff.kernels.launch import Launch, recording
from fastdiff.models import build_model
from fastdiff.models.blocks import AttentionBlock
from fastdiff.models.layers import GroupNormSiLU
from fastdiff.presets import PRESETS

from .launches import _loss, _norm, _step
from .program import Program
from .shapes import NormShape

MODEL = "imagenet64_uncond"
BATCH = 64


def counted(machine_code: bytes) -> tuple[int, list[int]]:
    """Instructions that a warp runs outside loops, and in one iteration of each loop.

    Left out are padding, subroutines behind the end (slow divisions) and the first part of every if/else: the loss's
    likelihood at t = 0, which one sample in a thousand takes.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return counted_in(text)


def counted_in(text: str) -> tuple[int, list[int]]:
    """The counts of ``counted`` from nvdisasm's text."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    runs = [not re.match(r"(@!?U?P\w+ )?NOP", one) for one in code]
    end = max(at for at, one in enumerate(code) if "EXIT" in one) + 1
    target = {at: labels[found[1]] for at, one in enumerate(code) if (found := re.search(r"BRA.*?`\((\.L\w+)\)", one))}
    for at, to in target.items():
        if code[at].startswith("@") and at < to < end and to <= target.get(to - 1, 0) and code[to - 1][0] != "@":
            runs[at + 1 : to] = [False] * (to - at - 1)
    loops = [(to, at + 1) for at, to in target.items() if to < at < end]
    inside = [sum(runs[start:stop]) for start, stop in loops]
    return sum(runs[:end]) - sum(inside), inside


class Pass(NamedTuple):
    """A pass of an operation: those of its launches that read the images, and how many there are in all."""

    workload: str
    main: list[Launch]
    launches: int
    candidate: str = "triton"
    calls: int = 0

    @property
    def programs(self) -> list[Program]:
        """Of the main launches."""
        return [Program.of(one, self.workload) for one in self.main]

    @property
    def fingerprint(self) -> str:
        """Of all their programs."""
        return " ".join(program.fingerprint for program in self.programs)


def compiled(one: Pass) -> Compiled:
    """A line of the table."""
    counts, figures = [], []
    for program in one.programs:
        counts.append(counted(program.built_for("sm_90").asm["cubin"]))
        figures.append(program.compile_for("sm_90"))
    loops = [length for _, found in counts for length in found]
    arguments, grid = one.main[0].arguments, one.main[0].grid
    pixels = arguments.get("BLOCK_PIXELS") or arguments.get("P") or arguments["B"]
    if "GROUPS" in arguments:
        trips = -(-arguments.get("pixels_per_split", arguments["pixels"]) // pixels)
    else:
        trips = arguments.get("per_split", arguments["CHANNELS"])
    return Compiled(
        commit=PRESENT,
        workload=one.workload,
        candidate=one.candidate,
        calls=one.calls,
        launches=one.launches,
        programs=math.prod(grid),
        warps=one.main[0].num_warps,
        resident=min(each.resident for each in figures),
        registers=max(each.registers for each in figures),
        groups=arguments.get("GROUPS", 0),
        channels=arguments.get("BLOCK_CHANNELS") or arguments.get("C", 1),
        pixels=pixels,
        stages=arguments.get("STAGES", 1),
        trips=trips if loops else 0,
        straight=sum(found for found, _ in counts),
        loop=loops[0] if loops else 0,
        second=loops[1] if len(loops) > 1 else 0,
        fingerprint=one.fingerprint,
    )


def present() -> Iterator[Pass]:
    """The passes of the benchmark's norms, steps and losses, and of the norms of MODEL's training step."""
    for n, channels, size in GPU_NORMS:
        for layout, memory_format in LAYOUTS.items():
            shape = NormShape(channels, size, conditioned=True, silu=True)
            run = partial(_norm, shape, n, torch.bfloat16, memory_format, True)
            yield from _passes("group_norm_silu", f"N{n} C{channels} {size}x{size}, bfloat16, {layout}", run)
    for n, size in GPU_IMAGES:
        for layout in LAYOUTS:
            where = f"N{n} {size}x{size}"
            for noise, inside in (("drawn inside", True), ("given", False)):
                run = partial(_step, n, size, layout, "ddpm", inside)
                yield from _passes("diffusion_step", f"{where} noise {noise}, float32, {layout}", run)
            run = partial(_loss, n, size, layout, "rescaled_mse")
            yield from _passes("diffusion_loss", f"{where}, float32, {layout}", run)
    for shape, calls in sorted(norms_of_a_step().items()):
        run = partial(_norm, shape, BATCH, torch.bfloat16, torch.channels_last, True)
        kind = "conditioned" if shape.conditioned else "SiLU" if shape.silu else "norm alone"
        where = f"N{BATCH} C{shape.channels} {shape.size}x{shape.size}, bfloat16, channels_last"
        for one in _passes("group_norm_silu", where, run):
            yield one._replace(candidate=f"{MODEL}, {kind}", calls=calls)


def _passes(op: str, where: str, run: Callable[[], object]) -> Iterator[Pass]:
    with recording() as launches:
        run()
    for direction in ("forward", "backward"):
        mine = [one for one in launches if ("backward" in one.kernel.fn.__name__) == (direction == "backward")]
        main = [one for one in mine if not one.kernel.fn.__name__.endswith(("_parameters", "_finish"))]
        if main:
            yield Pass(f"{op} {direction}, {where}", main, len(mine))


def norms_of_a_step() -> Counter[NormShape]:
    """How often MODEL calls each of its norms."""
    found: Counter[NormShape] = Counter()

    def norm(
        module: GroupNormSiLU,
        x: Tensor,
        *conditions: Tensor,
        input_bias: Tensor | None = None,
        second: None = None,
        with_input: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        found[NormShape(x.shape[1], x.shape[2], len(conditions) > 0, module.silu)] += 1
        return (x, x) if with_input else x

    def attention(module: AttentionBlock, x: Tensor) -> Tensor:
        norm(module.norm, x)
        return x

    config = PRESETS[MODEL].config(ModelConfig)
    patched = patch.object(GroupNormSiLU, "forward", norm), patch.object(AttentionBlock, "forward", attention)
    with patched[0], patched[1], torch.device("meta"):
        model = build_model(config, kernels="torch")
        Flops.of_module(model, model, config, 1, training=False)  # runs it on inputs of its shapes
    return found


def main() -> None:
    """Write the present kernels' lines; with --check say whether the lines are of these kernels (exit status 1: no)."""
    kept = read()
    found = list(present())
    if sys.argv[1:] == ["--check"]:
        known = {(one.workload, one.candidate): one.fingerprint for one in kept if one.commit == PRESENT}
        old = [one.workload for one in found if known.pop((one.workload, one.candidate), "") != one.fingerprint]
        print("".join(f"{TABLE.name} is of other kernels: {workload}\n" for workload in (*old, *known)), end="")
        print(f"{len(found)} passes; after a change: python -m tests.programs.instructions")
        sys.exit(bool(old or known))
    write([one for one in kept if one.commit != PRESENT] + [compiled(one) for one in found])


if __name__ == "__main__":
    main()
