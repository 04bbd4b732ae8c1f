"""The suite quality: measures one run."""

from pathlib import Path

from fastdiff.benchmarks.quality.measure import Bench, Figures, Machine
from fastdiff.benchmarks.quality.pictures import SOURCES
from fastdiff.config import QualityConfig


def measure_run(config: QualityConfig, machine: Machine, quick: bool) -> Figures:
    """Measure config.run on the one set of ``config``, and say its figures."""
    if not config.run:
        raise ValueError("run: name a run or checkpoint with --run")
    if len(config.set) > 1:
        raise ValueError(f"run {config.run} was trained on one set: name it with --set {' or '.join(config.set)}")
    (name,) = config.set
    bench = Bench(SOURCES[name], Path(config.out_dir) / "data" / name, config, machine, quick)
    figures = bench.measure(Path(config.run))
    how = f"n={config.num_samples:,}, {config.sampler} {config.steps} steps"
    machine.display.line(f"{config.run} on {name} ({how}): {figures.line()}")
    return figures
