"""``fastdiff evaluate``: measure how good a checkpoint is."""

import math
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.cli import checkpoints, metrics
from fastdiff.cli.help import Paneled
from fastdiff.cli.loading import find_with_rate, load_for, young_average
from fastdiff.cli.options import (
    CheckpointArgument,
    DebugFlag,
    EmaLengthFlag,
    EmaRateFlag,
    Flags,
    PresetFlag,
    path_option,
    with_flags,
)
from fastdiff.cli.scripts import log_formats
from fastdiff.config import DataConfig, DiffusionConfig, Labels, ModelConfig, NllConfig, RuntimeConfig

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint
    from fastdiff.cli.display import Display
    from fastdiff.data import Dataset
    from fastdiff.evaluation.nll import Bound, Nll

app = typer.Typer(help="Measure how good a model is.", rich_markup_mode=None)
app.command("fid", cls=Paneled)(metrics.fid)
app.command("neighbours", cls=Paneled)(metrics.neighbours)
app.command("checkpoints", cls=Paneled)(checkpoints.checkpoints)


@app.callback(invoke_without_command=True)
def _evaluate(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("nll", cls=Paneled)
@with_flags(NllConfig, RuntimeConfig, of_state_dicts=(ModelConfig, DiffusionConfig))
def nll(
    flags: Flags,
    checkpoint: CheckpointArgument = None,
    out_dir: Annotated[Path, path_option(help="Folder for the results.")] = Path("nll"),
    plot: Annotated[
        Path | None, path_option(help="Plot the terms to this .png file (extra 'plot': matplotlib).")
    ] = None,
    ema_rate: EmaRateFlag = None,
    ema_length: EmaLengthFlag = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds after which a process that waits for the others gives up.")
    ] = 600,
    preset: PresetFlag = None,
    debug: DebugFlag = False,
) -> None:
    """Compute the likelihood of a folder's images, in bits per dimension.

    For example: fastdiff evaluate nll runs/photos --data-dir photos --num-samples 1000

    The likelihood is the variational bound: one model call per image and timestep. Under torchrun several processes
    share the images: torchrun --nproc-per-node=8 -m fastdiff evaluate nll ...

    A checkpoint stores its model and diffusion process. A bare state dict (.pt) reveals the architecture, but not the
    number of heads or the process: --help-all lists the flags that describe it.
    """
    config = NllConfig.from_flags(flags)
    if not config.data_dir:
        raise ValueError("no data: name a folder of images with --data-dir")
    to_terminal = "stdout" in log_formats()
    from fastdiff.cli.display import Display, Slowly
    from fastdiff.data import load_shared
    from fastdiff.evaluation.files import NllFiles
    from fastdiff.evaluation.nll import Nll, Stopped
    from fastdiff.runtime.device import Runtime, compiling
    from fastdiff.runtime.distributed import World
    from fastdiff.runtime.signals import StopRequest
    from fastdiff.runtime.threads import fit_to_cores

    fit_to_cores()
    world = World.join(timeout)
    with world.explained(f"use a smaller --batch-size than {config.batch_size}"):
        files = NllFiles(out_dir, plot, overwrite)
        world.from_main(files.check)
        machine = RuntimeConfig.from_flags(flags | {"precision": config.precision})
        runtime = world.on_all(lambda: Runtime.resolve(machine, world.local_rank if world.size > 1 else None))
        path = world.from_main(lambda: find_with_rate(checkpoint, ema_rate, ema_length))
        loaded = world.on_all(lambda: load_for(runtime, path, flags, preset))
        config = world.on_all(lambda: NllConfig.from_flags(_as_in_training(loaded, flags)))
        with Display(silent=not world.main or not to_terminal) as display:
            display.line(f"model: {path}, step {loaded.step}{young_average(loaded)}")
            with warnings.catch_warnings(action="ignore"):  # they are about training on these images
                dataset = load_shared(
                    DataConfig.from_flags(config.to_dict()),
                    loaded.model_config.image_size,
                    labelled=loaded.model_config.class_cond,
                    world=world,
                    display=display,
                )
            for line in (f"data: {dataset.preflight.line()}", *(dataset.notes if dataset.labels is not None else ())):
                display.line(line)
            evaluation = world.on_all(lambda: Nll(loaded, dataset, config, runtime, world))
            about = world.from_main(lambda: _about(path, loaded, config, dataset, evaluation, runtime.precision))
            display.line(
                f"evaluating: {evaluation.count} images of {loaded.model_config.image_size} pixels, "
                f"{evaluation.diffusion.num_timesteps} steps, seed {config.seed}; {world.describe()}, "
                f"{runtime.describe(evaluation.calls)}"
            )
            passes = evaluation.count * evaluation.diffusion.num_timesteps
            display.line(f"cost: {passes:,} images through the model; --num-samples and --steps reduce it")
            if runtime.compiles(evaluation.calls):
                display.line(compiling())
            with StopRequest("stopping after this step") as stop:
                try:
                    bound = evaluation.run(stop, Slowly(display))
                except Stopped as stopped:
                    so_far = f", {stopped.total_bpd:.4f} bits/dim" if stopped.images else ""
                    display.line(
                        f"stopped by {signal.Signals(stopped.signal).name}: {stopped.images} of {evaluation.count} "
                        f"images were done{so_far}; nothing is written"
                    )
                    status = 128 + stopped.signal
                else:
                    names = [dataset.names[i % len(dataset.names)] for i in range(evaluation.count)]
                    steps = evaluation.diffusion.timestep_map[::-1]
                    _tell(display, path, loaded, bound, names, about)
                    world.from_main(lambda: files.write(bound, names, steps, about))
                    display.line(f"wrote {files.out_dir}{'' if plot is None else f' and {plot}'}")
                    status = 0
    world.leave()
    raise typer.Exit(status)


def _as_in_training(loaded: "Checkpoint", flags: Flags) -> Flags:
    """The flags, completed with the window and --labels auto of the run that trained the model."""
    run = loaded.metadata.get("run_config", {}).get("data", {})
    known = {} if run.get("window") is None else {"window": run["window"]}
    if run.get("labels") == Labels.AUTO and not flags.get("label_file"):
        known["labels"] = Labels.AUTO
    return known | flags


def _about(
    path: Path, loaded: "Checkpoint", config: NllConfig, dataset: "Dataset", evaluation: "Nll", precision: str
) -> dict[str, Any]:
    """The origin of the figures, as values for JSON."""
    from fastdiff.checkpoint import sha256

    process = evaluation.diffusion
    return {
        "images": evaluation.count,
        "different_images": min(evaluation.count, len(dataset.images)),
        "data_dir": str(Path(config.data_dir).resolve()),
        "data_fingerprint": dataset.fingerprint,
        "labels": config.labels if dataset.labels is not None else None,
        "checkpoint": str(path.resolve()),
        "sha256": sha256(path),
        "step": loaded.step,
        "ema_rate": loaded.metadata.get("ema_rate"),
        **{name: loaded.metadata[name] for name in ("ema_length",) if name in loaded.metadata},
        "timesteps": process.num_timesteps,
        "timestep_respacing": config.respacing or loaded.diffusion_config.timestep_respacing,
        "diffusion_steps": process.original_num_steps,
        "clip_denoised": config.clip_denoised,
        "seed": config.seed,
        "precision": precision,
    }


def _tell(
    display: "Display", path: Path, loaded: "Checkpoint", bound: "Bound", names: list[str], about: dict[str, Any]
) -> None:
    """Log the result in one line, after a warning if some values are not finite."""
    import numpy as np

    figures, rate = bound.figures(), about["ema_rate"]
    strange = np.flatnonzero(~np.isfinite(bound.total_bpd))
    if len(strange):
        display.line(
            f"warning: the bound of {len(strange)} of {len(names)} images is not a finite number, the first is "
            f"{names[strange[0]]!r}: the weights are damaged, or need --precision fp32"
        )
    error = f" ± {figures['standard_error']:.4f}" if math.isfinite(figures["standard_error"]) else ""
    weights = f"EMA {rate:g}" if rate else "raw weights"
    if (length := about.get("ema_length")) is not None:
        weights = f"average of length {length:g}"
    if not loaded.metadata:
        weights = path.name  # a bare state dict does not say whether it is an EMA
    images = f"{about['images']} images"
    if about["different_images"] < about["images"]:
        images = f"{about['images']} draws of {about['different_images']} images"
    spec = about["timestep_respacing"]
    respaced = f" ({spec})" if spec not in ("", str(about["timesteps"])) else ""
    display.line(
        f"{figures['bits_per_dim']:.4f} bits/dim{error} (prior {figures['prior_bits_per_dim']:.4f}) over {images}, "
        f"{weights}, {about['timesteps']} of {about['diffusion_steps']} steps{respaced}, seed {about['seed']}"
    )
