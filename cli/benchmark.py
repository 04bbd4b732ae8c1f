"""``fastdiff benchmark``: speed, compared with other libraries and with the limit of this machine."""

import io
import sys
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import DebugFlag, Flags, PresetFlag, path_option, with_flags
from fastdiff.config import DiffusionConfig, Kernels, ModelConfig, QualityConfig, RuntimeConfig
from fastdiff.config.base import tuple_of
from fastdiff.presets import with_preset

_SMALL = {"image_size": 32, "num_channels": 64, "learn_sigma": True, "noise_schedule": "cosine"}
"""The model of the published comparisons: 32 pixels, 64 channels, 9.9 M parameters."""


Suite = StrEnum("Suite", ["kernels", "unet", "train", "sample", "step", "data", "features", "growth", "quality", "all"])
"""What can be measured."""


@with_flags(ModelConfig, DiffusionConfig, RuntimeConfig, QualityConfig)
def benchmark(
    flags: Flags,
    suite: Annotated[Suite, typer.Argument(help="What to measure.")] = Suite.all,
    preset: PresetFlag = None,
    batch_size: Annotated[str, typer.Option(help="Images per batch, or several sizes: 1,16.")] = "16",
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds, each of which times every candidate; in data and growth, repetitions.", min=1),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and shapes: all in under ten minutes.")] = False,
    csv: Annotated[Path | None, path_option(help="Append the rows to this CSV file.")] = None,
    chart: Annotated[Path | None, path_option(help="Plot unet, train and sample to this PNG file.")] = None,
    compare: Annotated[Path | None, path_option(help="Report changes since the run in this CSV file.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Time the kernels, the UNet, a training step, sampling, a sampling step, the data, features of images, and how
    cost grows with size.

    unet, train and sample start from the plain path (--kernels reference --compile off --precision fp32
    --memory-format contiguous: improved-diffusion's operations) and add one change at a time up to the defaults. With
    any of those four flags they measure the plain path and the requested settings. The installed peers follow.
    Every candidate is checked first: a wrong one is not timed, and the exit status is 1.

    The candidates take turns, each between two runs of the first candidate. "first" is the speed relative to those two
    runs, "before" the speed relative to the candidate above. "of limit" is the share of the speed that the rates of
    this device, measured in the same run, would allow.

    data and features use their own images and models; they read only --rounds, --quick and --device. growth uses the
    first of several batch sizes. --compare needs at least five rounds in both runs to detect small changes.

    Without model or diffusion flags the model is a small one of 32 pixels and 64 channels; with any, the defaults below
    apply.

    quality, which all leaves out, measures pictures instead of time, on two sets of real images (extra 'quality'): the
    share of a run's samples that a classifier gives the class that was asked for, their distance to the real images
    (FD), recall, and bits/dim of held-out images; with --quick only what takes little time. It trains recipes with
    several seeds, for hours; the same command goes on where it was stopped. --run RUN --set digits judges one run.
    """
    _refuse_foreign(suite, flags, preset, csv=csv, chart=chart, compare=compare, rounds=rounds)
    if suite is Suite.quality:
        _quality(flags, quick)
        return
    values = with_preset(flags, preset)
    if not {f.name for kind in (ModelConfig, DiffusionConfig) for f in fields(kind)} & set(values):
        values = _SMALL | values
    model, diffusion = ModelConfig.from_flags(values), DiffusionConfig.from_flags(values)
    ours = RuntimeConfig.from_flags(flags)
    sizes = tuple_of(int, "batch_size", batch_size)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch_size must be positive, such as 16 or 1,16, not {batch_size!r}")
    import torch
    from rich.console import Console

    from fastdiff.benchmarks.chart import PANELS
    from fastdiff.benchmarks.command import measure_suites, report
    from fastdiff.benchmarks.workload import Workload
    from fastdiff.kernels.backend import HAS_TRITON, INTERPRETED
    from fastdiff.runtime.device import Runtime
    from fastdiff.runtime.signals import signals_as_exceptions

    # what this machine cannot run is refused here: it would otherwise be a failed row
    device = Runtime.resolve(ours).device
    if ours.kernels is Kernels.TRITON and not HAS_TRITON:
        raise ValueError("kernels triton: the package triton is not installed; use auto or torch")
    if ours.kernels is Kernels.TRITON and device.type == "cpu" and not INTERPRETED:
        raise ValueError("kernels triton: they need a GPU; use auto or torch on a CPU")
    suites = list(Suite) if suite is Suite.all else [suite]
    if chart is not None and not set(PANELS) & set(suites):
        raise ValueError(f"chart shows {', '.join(PANELS)}: measure one of them, or leave --chart out")
    workloads = [Workload(model, diffusion, size, device, preset or "") for size in sizes]
    asked = ours if set(flags) & {f.name for f in fields(RuntimeConfig)} - {"device"} else None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × still gets the figures
    width = None if sys.stdout.isatty() else 100  # wide enough for the tables in a file
    console = Console(width=width, markup=False, highlight=False)
    with signals_as_exceptions(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        tables = measure_suites(suites, workloads, asked, rounds, quick)
        good = report(tables, device, console, csv, chart, compare)
    if not good:
        raise typer.Exit(1)


_OF_QUALITY = {f.name for f in fields(QualityConfig)}


def _refuse_foreign(suite: Suite, flags: Flags, preset: str | None, **others: object) -> None:
    """ValueError if a flag is not of this suite."""
    if suite is not Suite.quality:
        if name := next((name for name in flags if name in _OF_QUALITY), None):
            raise ValueError(f"{name} is a flag of quality, not of {suite}: leave it out")
        return
    ours = _OF_QUALITY | {f.name for f in fields(RuntimeConfig)}
    given = [name for name in flags if name not in ours]
    given += [name for name, value in {"preset": preset, **others}.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]} means nothing for quality: leave it out")


def _quality(flags: Flags, quick: bool) -> None:
    """Measure pictures, not time."""
    config = QualityConfig.from_flags(flags)
    from fastdiff.benchmarks.quality.command import compare_recipes, measure_run
    from fastdiff.benchmarks.quality.measure import Machine
    from fastdiff.cli.display import Display, Slowly
    from fastdiff.runtime.device import Runtime
    from fastdiff.runtime.signals import signals_as_exceptions
    from fastdiff.runtime.threads import fit_to_cores

    fit_to_cores()
    with signals_as_exceptions(), Display() as display:
        runtime = Runtime.resolve(RuntimeConfig.from_flags(flags))
        run = measure_run if config.run else compare_recipes
        run(config, Machine(runtime, display, lambda what: Slowly(display, what)), quick)
