"""``fastdiff train``: a folder of images in, a run folder out."""

import shlex
import sys

import typer

from fastdiff.cli.options import DebugFlag, Flags, with_flags
from fastdiff.cli.scripts import log_folder, log_formats
from fastdiff.config import DataConfig, DiffusionConfig, ModelConfig, Recipe, RuntimeConfig, StartConfig, TrainConfig


@with_flags(DataConfig, StartConfig, TrainConfig, ModelConfig, DiffusionConfig, RuntimeConfig)
def train(flags: Flags, debug: DebugFlag = False) -> None:
    """Train a model on a folder of images.

    For example: fastdiff train --data-dir photos --image-size 64

    Under torchrun several processes share the work: torchrun --nproc-per-node=8 -m fastdiff train ...
    """
    raise typer.Exit(run_training(flags))


def run_training(flags: Flags, classifier: bool = False) -> int:
    """Train a diffusion model or a ``classifier`` with the flags and improved-diffusion's environment variables.

    Returns the exit status.
    """
    if "run_dir" not in flags and (folder := log_folder()) is not None:
        flags = {"run_dir": str(folder)} | ({} if classifier else {"recipe": Recipe.IMPROVED}) | flags
    formats = log_formats()
    if "tensorboard" in formats:
        flags = {"tensorboard": True} | flags
    start = StartConfig.from_flags(flags)
    from fastdiff.cli.display import Display
    from fastdiff.runtime.distributed import World
    from fastdiff.runtime.threads import fit_to_cores
    from fastdiff.training.run import run

    fit_to_cores()
    world = World.join(start.timeout)
    command = shlex.join(["fastdiff", *sys.argv[1:]])
    with Display(silent=not world.main or "stdout" not in formats) as display:
        status = run(flags, start, world, display, classifier, command).status
    world.leave()
    return status
