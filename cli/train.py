"""``fastdiff train``: a folder of images in, a run folder out."""

from pathlib import Path
from typing import Annotated, Any

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
from fastdiff.config import DataConfig, DiffusionConfig, ModelConfig, RuntimeConfig, TrainConfig


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
    status = run_training(all_flags(flags, preset), run_dir, resume=resume, init_from=init_from)
    raise typer.Exit(status)


def run_training(flags: Flags, run_dir: Path | None, *, resume: bool = False, init_from: Path | None = None) -> int:
    """Train as ``flags`` say; returns the exit status."""
    from fastdiff.cli.display import TrainingDisplay
    from fastdiff.runtime.device import Runtime
    from fastdiff.training import run_folder

    data = build(DataConfig, flags)
    run_dir = run_dir or _default_run_dir(data)
    resume = resume and run_folder.holds_run(run_dir)
    config = run_folder.RunConfig.read(run_dir) if resume else _new_run(flags)
    if resume:
        refuse_contradiction(flags, str(run_dir), config.model, config.diffusion)
        config = _updated(config, flags)
    else:
        run_folder.refuse_other_run(run_dir)
    runtime = Runtime.resolve(build(RuntimeConfig, flags))
    with TrainingDisplay() as display:
        return _train(config, flags, runtime, run_dir, resume, init_from, display)


def _train(
    config: Any, flags: Flags, runtime: Any, run_dir: Path, resume: bool, init_from: Path | None, display: Any
) -> int:
    from dataclasses import replace

    from fastdiff.config import is_table_size
    from fastdiff.data import load_dataset
    from fastdiff.diffusion import build_diffusion
    from fastdiff.training import Trainer
    from fastdiff.training.run_folder import Log

    build_diffusion(config.diffusion)  # a respacing that does not fit is told before the images are read
    size, labelled = config.model.image_size, config.model.class_cond
    dataset = load_dataset(config.data, size, labelled=labelled, on_progress=display.decoded)
    if labelled:
        config = _with_classes(config, dataset.class_names, "num_classes" in flags or resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    log = Log(run_dir, display.line)
    try:
        log(f"data: {dataset.preflight.line()}")
        if config.model.channel_mult is None and not is_table_size(size):
            log(f"model: channel_mult {','.join(map(str, config.model.multipliers))} chosen for {size} pixels")
        trainer = Trainer(config, dataset, runtime, run_dir, log)
        if init_from is not None and not resume:
            trainer.init_from(init_from)
        if resume:
            trainer.resume()
        config.write(run_dir)
        log(f"model: {sum(p.numel() for p in trainer.state.parameters) / 1e6:.1f} M parameters on "
            f"{runtime.describe(trainer.model_calls)}")
        log(f"run: {run_dir.resolve()}, step {trainer.state.step} of {config.train.steps}, "
            f"a checkpoint every {config.train.save_interval} steps and at the end")
        status = trainer.run(display.trained)
        again = f"fastdiff train --data-dir {config.data.data_dir} --run-dir {run_dir} --resume"
        log(f"go on with: {again}" if status else f"sample with: fastdiff sample {run_dir} --out samples.npz")
        return status
    finally:
        log.close()
