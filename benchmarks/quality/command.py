"""The suite quality: measures one run, or compares recipes."""

from pathlib import Path

from fastdiff.benchmarks.quality.contest import Contest
from fastdiff.benchmarks.quality.measure import Bench, Figures, Machine
from fastdiff.benchmarks.quality.pictures import SOURCES
from fastdiff.benchmarks.quality.table import markdown
from fastdiff.config import QualityConfig
from fastdiff.data import read_samples
from fastdiff.evaluation.session import is_checkpoint
from fastdiff.runtime.files import replacing


def measure_run(config: QualityConfig, machine: Machine, quick: bool) -> Figures:
    """Measure config.run on the one set of ``config``, and say its figures."""
    if len(config.set) > 1:
        raise ValueError(f"run {config.run} was trained on one set: name it with --set {' or '.join(config.set)}")
    (name,) = config.set
    bench = Bench(SOURCES[name], Path(config.out_dir) / "data" / name, config, machine, quick)
    run = Path(config.run)
    figures = bench.measure(run)
    drawn = f"n={config.num_samples:,}, {config.sampler} {config.steps} steps"
    how = drawn if is_checkpoint(run) else f"n={len(read_samples(run).images):,}"
    machine.display.line(f"{config.run} on {name} ({how}): {figures.line()}")
    return figures


def compare_recipes(config: QualityConfig, machine: Machine, quick: bool) -> None:
    """Make the rows that ``config`` asks for, then say and write their table."""
    contest = Contest(config, machine, quick)
    text = markdown(contest.run())
    path = contest.out_dir / "quality.md"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    for line in text.splitlines():
        machine.display.line(line)
    machine.display.line(f"wrote {path}; {contest.path} has every seed, {contest.out_dir / 'pictures'} the samples")
