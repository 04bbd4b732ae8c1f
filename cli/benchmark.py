"""``fastdiff benchmark``: how fast, against the plain path and a peer, on this machine."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import DebugFlag, Flags, PresetFlag, all_flags, build, with_flags
from fastdiff.config import DiffusionConfig, ModelConfig, RuntimeConfig

if TYPE_CHECKING:
    import torch
    from rich.console import Console

_SMALL = {"image_size": 32, "num_channels": 64, "learn_sigma": True, "noise_schedule": "cosine"}
"""The model of the published comparisons: 32 pixels, 64 channels, 9.9 M parameters."""


class Suite(StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    UNET = "unet"
    TRAIN = "train"
    SAMPLE = "sample"
    STEP = "step"
    ALL = "all"


@with_flags(ModelConfig, DiffusionConfig, RuntimeConfig)
def benchmark(
    flags: Flags,
    suite: Annotated[Suite, typer.Argument(help="What to measure.")] = Suite.ALL,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds in which the candidates take turns.", min=1)] = 7,
    csv: Annotated[Path | None, typer.Option(help="Add the rows to this CSV file.")] = None,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Time the kernels, the UNet, a training step, sampling, and a sampling step beside the model's call in it.

    The kernels come with shapes of their own, and rows of their own kind: with --csv they go to NAME_kernels.csv.

    For the others, without model flags: the small model, 32 pixels, 64 channels. The ratio is of each candidate's time
    to that of the first one, round by round: the plain path (--kernels reference --compile off --precision fp32
    --memory-format contiguous), in the suite step the model's call alone.
    """
    values = all_flags(flags, preset)
    names = set(ModelConfig.__dataclass_fields__) | set(DiffusionConfig.__dataclass_fields__)
    if not names & set(values):
        values = _SMALL | values
    model, diffusion, runtime = build(ModelConfig, values), build(DiffusionConfig, values), build(RuntimeConfig, values)
    import torch
    from rich.console import Console

    from fastdiff.benchmarks.harness import environment
    from fastdiff.runtime.device import Runtime

    device = Runtime.resolve(runtime).device
    console = Console()
    about = environment(device)
    with torch.random.fork_rng():
        if suite in (Suite.KERNELS, Suite.ALL):
            _time_kernels(device, rounds, csv and csv.with_name(f"{csv.stem}_kernels.csv"), console, about)
        if suite is not Suite.KERNELS:
            suites = [suite] if suite is not Suite.ALL else [Suite.UNET, Suite.TRAIN, Suite.SAMPLE, Suite.STEP]
            _time_models(suites, model, diffusion, runtime, device, batch_size, rounds, csv, console, about)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))


def _time_kernels(
    device: "torch.device", rounds: int, csv: Path | None, console: "Console", about: Mapping[str, str]
) -> None:
    import torch
    from rich.table import Table

    from fastdiff.benchmarks.kernels import measure_all
    from fastdiff.benchmarks.problems import problems
    from fastdiff.benchmarks.roofs import measure_roofs
    from fastdiff.benchmarks.rows import append_rows

    if device.type == "cpu":
        console.print("no GPU: these are CPU figures of the PyTorch implementations, at small sizes")
    roofs = measure_roofs(device, torch.bfloat16)
    copying, multiplying = roofs.bytes_per_s / 1e9, roofs.flops_per_s / 1e12
    console.print(f"measured here: copy {copying:.0f} GB/s, matrix product in bf16 {multiplying:.2f} TFLOP/s")
    for rows in measure_all(problems(device), rounds, device):
        problem, direction = rows[0].problem, rows[0].direction
        title = f"{problem.op} {direction}, {problem.shape}, {problem.layout}"
        table = Table("candidate", "median, us", "p20 to p80", "GB/s", "TFLOP/s", "of the roof", title=title, width=78)
        for row in rows:
            values = row.as_dict(roofs)
            if csv is not None:
                append_rows(csv, [{**values, "rounds": rounds, **about}])
            if row.remark:
                table.add_row(row.candidate, row.remark)
                continue
            spread = f"{values['p20_us']} to {values['p80_us']}"
            rates = f"{values['gb_per_s']}", f"{values['tflop_per_s']}", f"{values['share_of_roof']:.0%}"
            table.add_row(row.candidate, f"{values['median_us']}", spread, *rates)
        console.print(table)
    if csv is not None:
        console.print(f"rows added to {csv}")


def _time_models(
    suites: Sequence[Suite],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    runtime: RuntimeConfig,
    device: "torch.device",
    batch_size: int,
    rounds: int,
    csv: Path | None,
    console: "Console",
    about: Mapping[str, str],
) -> None:
    from rich.table import Table

    from fastdiff.benchmarks.harness import interleaved
    from fastdiff.benchmarks.rows import append_rows
    from fastdiff.benchmarks.suites import SUITES, Workload, candidates

    console.print("building and checking the candidates; compiling takes a minute or two when its cache is cold ...")
    workload = Workload(model, diffusion, batch_size, device)
    found = candidates(workload, runtime)
    parameters = sum(p.numel() for p in next(iter(found.values())).module.parameters())
    title = f"{model.image_size} pixels, {parameters / 1e6:.1f} M parameters, batch {batch_size}"
    table = Table("suite", "candidate", "median, s", "p20 to p80", "images/s", "ratio", title=title)
    rows = []
    for name in suites:
        for timing in interleaved(SUITES[name](workload, found), rounds, warmup=2, device=device):
            spread = f"{timing.quantile(0.2):.3f} to {timing.quantile(0.8):.3f}"
            speed = batch_size / timing.median
            table.add_row(name, timing.name, f"{timing.median:.3f}", spread, f"{speed:.1f}", f"{timing.speedup():.3f}")
            rows.append(
                {
                    "suite": str(name),
                    "candidate": timing.name,
                    "image_size": model.image_size,
                    "num_channels": model.num_channels,
                    "batch_size": batch_size,
                    "rounds": rounds,
                    "median_s": round(timing.median, 5),
                    "p20_s": round(timing.quantile(0.2), 5),
                    "p80_s": round(timing.quantile(0.8), 5),
                    "speedup": round(timing.speedup(), 4),
                    **about,
                }
            )
    console.print(table)
    if csv is not None:
        append_rows(csv, rows)
        console.print(f"rows added to {csv}")
