"""``fastdiff train``: a folder of images in, a run folder out."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import (
    DebugFlag,
    Flags,
    PresetFlag,
    all_flags,
    build,
    refuse_contradiction,
    with_flags,
)
from fastdiff.config import DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, TrainConfig, is_table_size

if TYPE_CHECKING:
    from fastdiff.training.run_folder import RunConfig


@with_flags(DataConfig, TrainConfig, ModelConfig, DiffusionConfig, RuntimeConfig)
def train(
    flags: Flags,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/NAME of the data.")] = None,
    preset: PresetFlag = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    init_from: Annotated[Path | None, typer.Option(help="Begin with the weights of this checkpoint.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Train a model on a folder of images."""
    raise typer.Exit(run_training(flags, run_dir, preset=preset, resume=resume, init_from=init_from))


def run_training(
    flags: Flags,
    run_dir: Path | None,
    *,
    preset: str | None = None,
    resume: bool = False,
    init_from: Path | None = None,
) -> int:
    """Train as preset and flags say, or go on as the folder's run and flags do; returns the exit status."""
    if "data_dir" not in flags and not resume:
        raise ValueError("no data: name a folder of images with --data-dir")
    if "steps" not in flags and flags.get("lr_anneal_steps"):
        flags = flags | {"steps": flags["lr_anneal_steps"]}  # improved-diffusion's way to say how long
    from fastdiff.cli.display import Display
    from fastdiff.data import load_dataset
    from fastdiff.diffusion import build_diffusion
    from fastdiff.runtime.device import Runtime
    from fastdiff.training import Trainer, run_folder

    run_dir = run_dir or Path("runs") / (Path(flags.get("data_dir", "")).resolve().name or "root")
    resuming = resume and run_folder.holds_run(run_dir)
    if not resuming:
        run_folder.refuse_other_run(run_dir)
    if "data_dir" in flags and run_dir.resolve().is_relative_to(Path(flags["data_dir"]).resolve()):
        raise ValueError(f"run_dir {run_dir} lies inside the data folder, whose images it would add to: name another")
    config = (
        _continued_run(run_folder.RunConfig.read(run_dir), flags, run_dir)
        if resuming
        else _new_run(all_flags(flags, preset))
    )
    runtime = Runtime.resolve(config.runtime)
    build_diffusion(config.diffusion)  # a respacing that does not fit is told before the images are read

    with Display() as display:
        labelled = config.model.class_cond
        dataset = load_dataset(
            config.data,
            config.model.image_size,
            labelled=labelled,
            on_progress=lambda done, total: display.advance("images", done, total),
        )
        display.finish("images")
        if labelled:
            config = _with_classes(config, dataset.class_names, given=resuming or "num_classes" in flags)
        run_dir.mkdir(parents=True, exist_ok=True)
        with run_folder.Log(run_dir, display.line) as log:
            log(f"data: {dataset.preflight.line()}")
            trainer = Trainer(config, dataset, runtime, run_dir, log)
            if resume:
                trainer.resume()
            if init_from is not None and trainer.state.step == 0:
                trainer.init_from(init_from)
            config.write(run_dir)
            log(f"model: {describe_model(config.model, trainer.state.num_parameters)}")
            log(f"on: {runtime.describe(trainer.model_calls)}")
            log(
                f"run: {run_dir.resolve()}, step {trainer.state.step} of {config.train.steps}, "
                f"a checkpoint every {config.train.save_interval} steps and at the end"
            )
            try:
                status = trainer.run(lambda step, steps, note: display.advance("step", step, steps, note))
            except (ValueError, OSError):
                if trainer.state.step == 0:  # nothing came of it: a second attempt needs no other folder
                    (run_dir / "config.json").unlink(missing_ok=True)
                raise
            again = ["fastdiff", "train", "--data-dir", config.data.data_dir, "--run-dir", str(run_dir), "--resume"]
            drawing = ["fastdiff", "sample", str(run_dir), "--out", "samples.npz"]
            log(f"go on with: {shlex.join(again)}" if status else f"sample with: {shlex.join(drawing)}")
    return status


def _new_run(flags: Flags) -> "RunConfig":
    """The run that the flags describe; ValueError where a configuration does not hold together."""
    data, model, diffusion = build(DataConfig, flags), build(ModelConfig, flags), build(DiffusionConfig, flags)
    if not data.data_dir:
        raise ValueError("no data: name a folder of images with --data-dir")
    data = replace(data, data_dir=str(Path(data.data_dir).resolve()))  # a run may be resumed from elsewhere
    train = build(TrainConfig, flags)
    from fastdiff.training.run_folder import RunConfig

    return RunConfig(model, diffusion, data, train, build(RuntimeConfig, flags))


def _continued_run(config: "RunConfig", flags: Flags, run_dir: Path) -> "RunConfig":
    """The run of the folder with the flags that may change on the way: all but the model and the process."""
    refuse_contradiction(flags, str(run_dir), config.model, config.diffusion)
    return replace(
        config,
        data=build(DataConfig, flags, base=config.data),
        train=build(TrainConfig, flags, base=config.train),
        runtime=build(RuntimeConfig, flags, base=config.runtime),
    )


def _with_classes(config: "RunConfig", names: tuple[str, ...], given: bool) -> "RunConfig":
    """The run with the data's classes; ``given`` says that num_classes must stay as it is."""
    if not given:
        config = replace(config, model=replace(config.model, num_classes=len(names)))
    if config.class_names and config.class_names != names:
        raise ValueError(f"the data has the classes {', '.join(names)}, the run {', '.join(config.class_names)}")
    if len(names) > config.model.num_classes:
        raise ValueError(f"num_classes {config.model.num_classes} is too small: the data has {len(names)} classes")
    return replace(config, class_names=names)


def describe_model(config: ModelConfig, parameters: int) -> str:
    """Size and widths of a model in words."""
    chosen = "" if is_table_size(config.image_size) or config.channel_mult else ", chosen for the size"
    mult = ",".join(map(str, config.multipliers))
    return f"{parameters / 1e6:.1f} M parameters, {config.image_size} pixels, channel_mult {mult}{chosen}"
