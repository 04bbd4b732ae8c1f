"""``fastdiff benchmark``: how fast, against the plain path and a peer, on this machine."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import DebugFlag, Flags, PresetFlag, all_flags, build, with_flags
from fastdiff.config import DiffusionConfig, ModelConfig, RuntimeConfig

_SMALL = {"image_size": 32, "num_channels": 64, "learn_sigma": True, "noise_schedule": "cosine"}
"""The model of the published comparisons: 32 pixels, 64 channels, 9.9 M parameters."""


class Suite(StrEnum):
    """What can be measured."""

    UNET = "unet"
    TRAIN = "train"
    SAMPLE = "sample"
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
    """Time the UNet, a training step and sampling.

    Without model flags, the small model: 32 pixels, 64 channels. The ratio is of each candidate's time to that of the
    plain path (--kernels reference --compile off --precision fp32 --memory-format contiguous), round by round.
    """
    values = all_flags(flags, preset)
    names = set(ModelConfig.__dataclass_fields__) | set(DiffusionConfig.__dataclass_fields__)
    if not names & set(values):
        values = _SMALL | values
    model, diffusion, runtime = build(ModelConfig, values), build(DiffusionConfig, values), build(RuntimeConfig, values)
    import torch
    from rich.console import Console
    from rich.table import Table

    from fastdiff.benchmarks.harness import append_rows, environment, interleaved
    from fastdiff.benchmarks.suites import SUITES, Workload, candidates
    from fastdiff.runtime.device import Runtime

    device = Runtime.resolve(runtime).device
    console = Console()
    console.print("building and checking the candidates; compiling takes a minute or two when its cache is cold ...")
    workload = Workload(model, diffusion, batch_size, device)
    found = candidates(workload, runtime)
    about = environment(device)
    parameters = sum(p.numel() for p in next(iter(found.values())).module.parameters())
    title = f"{model.image_size} pixels, {parameters / 1e6:.1f} M parameters, batch {batch_size}"
    table = Table("suite", "candidate", "median, s", "p20 to p80", "images/s", "ratio to plain", title=title)
    rows = []
    with torch.random.fork_rng():
        for name in [suite] if suite is not Suite.ALL else SUITES:
            for timing in interleaved(SUITES[name](workload, found), rounds, warmup=2, device=device):
                spread = f"{timing.quantile(0.2):.3f} to {timing.quantile(0.8):.3f}"
                speed = batch_size / timing.median
                table.add_row(name, timing.name, f"{timing.median:.3f}", spread, f"{speed:.1f}", f"{timing.ratio:.2f}")
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
                        "ratio_to_plain": round(timing.ratio, 4),
                        **about,
                    }
                )
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if csv is not None:
        append_rows(csv, rows)
        console.print(f"rows added to {csv}")
