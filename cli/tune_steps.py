"""``fastdiff tune-steps``: find the best time grid of a checkpoint for few steps, and store it in the checkpoint."""

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

import typer

from fastdiff.cli.loading import find_with_rate, load_for, young_average
from fastdiff.cli.options import CheckpointArgument, DebugFlag, EmaLengthFlag, EmaRateFlag, Flags, with_flags
from fastdiff.config import RuntimeConfig, TimeGrid, TuneConfig

if TYPE_CHECKING:
    from pathlib import Path

    from fastdiff.sampling.tuning import Tuned


@with_flags(TuneConfig, RuntimeConfig)
def tune_steps(
    flags: Flags,
    checkpoint: CheckpointArgument = None,
    ema_rate: EmaRateFlag = None,
    ema_length: EmaLengthFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Find the timesteps at which few steps of a sampler come nearest to many, and store them in the checkpoint.

    For example: fastdiff tune-steps runs/photos --sampler unipc --steps 8

    fastdiff sample then uses them for this sampler and number of steps. Several grids may be stored side by side.
    Ctrl-C stores the best one so far.
    """
    config = TuneConfig.from_flags(flags)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("tune-steps runs in one process: start it without torchrun")
    from fastdiff.checkpoint import Lease, manifest_path, refuse_frozen
    from fastdiff.cli.display import Display, Slowly
    from fastdiff.runtime.device import Runtime, compiling
    from fastdiff.runtime.signals import StopRequest
    from fastdiff.runtime.threads import fit_to_cores
    from fastdiff.sampling.tuning import Tuning

    fit_to_cores()
    path = find_with_rate(checkpoint, ema_rate, ema_length)
    refuse_frozen(path)
    runtime = Runtime.resolve(RuntimeConfig.from_flags(flags))
    loaded = load_for(runtime, path)
    in_run = manifest_path(path.parent, loaded.step).exists()
    with Lease(path.parent, option="CHECKPOINT") if in_run else nullcontext(), Display() as display:
        tuning = Tuning(loaded, config, runtime)
        display.line(f"model: {path}, step {loaded.step}{young_average(loaded)}")
        display.line(f"tuning: {runtime.describe(tuning.model_calls)}, seed {config.seed}")
        display.line(f"cost: {tuning.cost}; --num-samples and --trials reduce it, Ctrl-C keeps the best grid so far")
        if runtime.compiles(tuning.model_calls):
            display.line(compiling())
        show = Slowly(display, "grids")
        with StopRequest("stopping after this step; the best grid so far is kept") as stop:
            whole = tuning.run(show, lambda: stop.received is not None)
        if stop.received is not None and not set(tuning.found.named.values()) <= tuning.found.errors.keys():
            display.line("stopped before the named grids were compared: nothing is stored")
            raise typer.Exit(128 + stop.received)
        display.finish("grids")
        for line in _stored(path, tuning.found, config, whole):
            display.line(line)
        raise typer.Exit(0 if stop.received is None else 128 + stop.received)


def _stored(path: "Path", found: "Tuned", config: TuneConfig, whole: bool) -> list[str]:
    """Store the best grid in the checkpoint's metadata; returns the lines of the log."""
    from fastdiff.checkpoint import add_metadata, read_metadata
    from fastdiff.sampling.time_grids import TUNED

    best, uniform = found.best, found.errors[found.named[TimeGrid.UNIFORM]]
    known = read_metadata(path).get(TUNED)
    grids = {key: value for key, value in known.items() if isinstance(value, dict)} if isinstance(known, dict) else {}
    told = {
        "timesteps": list(best),
        "error": round(found.errors[best], 4),
        "uniform_error": round(uniform, 4),
        "images": config.num_samples,
    }
    grids[config.sampler] = {**grids.get(config.sampler, {}), str(config.steps): told}
    add_metadata(path, **{TUNED: grids})
    others = ", ".join(f"{grid} {found.errors[named]:.2f}" for grid, named in found.named.items())
    return [
        f"grid: {','.join(map(str, best))}{'' if whole else ' (the search was stopped)'}",
        f"error: {found.errors[best]:.2f} after {len(found.errors)} grids, {others} (RMS in levels of 0 to 255)",
        f"stored in {path}: fastdiff sample {path} --sampler {config.sampler} --steps {config.steps} uses it",
    ]
