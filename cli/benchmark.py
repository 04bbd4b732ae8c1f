"""``fastdiff benchmark``: how fast, against whom, how close to the limit of this machine."""

import sys
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import DebugFlag, Flags, PresetFlag, all_flags, build, with_flags
from fastdiff.config import DiffusionConfig, ModelConfig, RuntimeConfig
from fastdiff.config.base import tuple_of

_SMALL = {"image_size": 32, "num_channels": 64, "learn_sigma": True, "noise_schedule": "cosine"}
"""The model of the published comparisons: 32 pixels, 64 channels, 9.9 M parameters."""


class Suite(StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    UNET = "unet"
    TRAIN = "train"
    SAMPLE = "sample"
    STEP = "step"
    DATA = "data"
    GROWTH = "growth"
    ALL = "all"


@with_flags(ModelConfig, DiffusionConfig, RuntimeConfig)
def benchmark(
    flags: Flags,
    suite: Annotated[Suite, typer.Argument(help="What to measure.")] = Suite.ALL,
    preset: PresetFlag = None,
    batch_size: Annotated[str, typer.Option(help="Images in a batch, or several sizes: 1,16.")] = "16",
    rounds: Annotated[
        int | None, typer.Option(help="Rounds in which the candidates take turns.", min=1, show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and shapes: all in under ten minutes.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw unet, train and sample to this PNG file.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Say what moved since the run of this CSV file.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Time the kernels, the UNet, a training step, sampling, a sampling step, the data, and how cost grows with size.

    unet, train and sample climb from the plain path (--kernels reference --compile off --precision fp32
    --memory-format contiguous: improved-diffusion's own operations) one change at a time to what a user gets; with any
    of those four flags they measure the plain path and what is asked for. Then come the peers that are installed. A
    candidate is checked first: a wrong one gets no time, and the exit status is 1.

    All candidates take turns. "× first" and "× before" are how many times as fast as the first and as the one above,
    round by round; "of limit" is the share of what the rates of this device, measured in the same run, would allow.

    Without model flags: the small model, 32 pixels, 64 channels.
    """
    values = all_flags(flags, preset)
    if not {f.name for kind in (ModelConfig, DiffusionConfig) for f in fields(kind)} & set(values):
        values = _SMALL | values
    model, diffusion, ours = build(ModelConfig, values), build(DiffusionConfig, values), build(RuntimeConfig, flags)
    sizes = tuple_of(int, "batch_size", batch_size)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch_size must be positive, such as 16 or 1,16, not {batch_size!r}")
    import torch
    from rich.console import Console

    from fastdiff.benchmarks.command import SUITES, Request, run
    from fastdiff.benchmarks.workload import Workload
    from fastdiff.runtime.device import resolve_device

    device = resolve_device(ours.device)
    workloads = [Workload(model, diffusion, size, device, preset or "") for size in sizes]
    asked = bool(set(flags) & {f.name for f in fields(RuntimeConfig)} - {"device"})
    suites = SUITES if suite is Suite.ALL else (suite,)
    console = Console() if sys.stdout.isatty() else Console(width=100)  # in a file the tables are whole
    with torch.random.fork_rng():
        good = run(Request(suites, workloads, ours, asked, rounds, quick), console, csv, chart, compare)
    if not good:
        raise typer.Exit(1)
