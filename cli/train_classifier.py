"""``fastdiff train-classifier``: a folder of images by class in, a classifier's run folder out."""

import typer

from fastdiff.cli.options import DebugFlag, Flags, with_flags
from fastdiff.cli.train import run_training
from fastdiff.config import (
    UNUSED_BY_CLASSIFIERS,
    ClassifierConfig,
    ClassifierTrainConfig,
    DataConfig,
    DiffusionConfig,
    RuntimeConfig,
    StartConfig,
)


@with_flags(
    *(DataConfig, StartConfig, ClassifierTrainConfig, ClassifierConfig, DiffusionConfig, RuntimeConfig),
    without=UNUSED_BY_CLASSIFIERS,
)
def train_classifier(flags: Flags, debug: DebugFlag = False) -> None:
    """Train a classifier of noisy images, which guides the samples of a diffusion model.

    For example: fastdiff train-classifier --data-dir photos --image-size 64

    Under torchrun several processes share the work: torchrun --nproc-per-node=8 -m fastdiff train-classifier ...
    """
    raise typer.Exit(run_training(flags, classifier=True))
