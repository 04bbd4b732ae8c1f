"""fastdiff: a fast engine to train and sample pixel-space diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.checkpoint import (
        Checkpoint,
        ClassifierCheckpoint,
        load_checkpoint,
        load_classifier,
        save_checkpoint,
        save_classifier,
    )
    from fastdiff.config import (
        ClassifierConfig,
        DataConfig,
        DiffusionConfig,
        ModelConfig,
        RuntimeConfig,
        SampleConfig,
        TrainConfig,
    )
    from fastdiff.data import ImageFolder
    from fastdiff.diffusion import (
        GaussianDiffusion,
        LossSecondMomentSampler,
        LossType,
        ModelMeanType,
        ModelVarType,
        UniformSampler,
        build_diffusion,
        space_timesteps,
    )
    from fastdiff.evaluation.api import sample_metrics
    from fastdiff.models import Classifier, SuperResUNet, UNet, build_classifier, build_model
    from fastdiff.presets import PRESETS, Preset
    from fastdiff.sampling import sample
    from fastdiff.training import train, train_classifier

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Checkpoint",
    "Classifier",
    "ClassifierCheckpoint",
    "ClassifierConfig",
    "DataConfig",
    "DiffusionConfig",
    "GaussianDiffusion",
    "ImageFolder",
    "LossSecondMomentSampler",
    "LossType",
    "ModelConfig",
    "ModelMeanType",
    "ModelVarType",
    "Preset",
    "RuntimeConfig",
    "SampleConfig",
    "SuperResUNet",
    "TrainConfig",
    "UNet",
    "UniformSampler",
    "build_classifier",
    "build_diffusion",
    "build_model",
    "load_checkpoint",
    "load_classifier",
    "sample",
    "sample_metrics",
    "save_checkpoint",
    "save_classifier",
    "space_timesteps",
    "train",
    "train_classifier",
]

_HOMES = {
    "checkpoint": (
        *("Checkpoint", "ClassifierCheckpoint", "load_checkpoint", "load_classifier", "save_checkpoint"),
        "save_classifier",
    ),
    "config": (
        *("ClassifierConfig", "DataConfig", "DiffusionConfig", "ModelConfig", "RuntimeConfig", "SampleConfig"),
        "TrainConfig",
    ),
    "data": ("ImageFolder",),
    "diffusion": (
        *("GaussianDiffusion", "LossSecondMomentSampler", "LossType", "ModelMeanType", "ModelVarType"),
        *("UniformSampler", "build_diffusion", "space_timesteps"),
    ),
    "evaluation.api": ("sample_metrics",),  # fastdiff runs is in evaluation, too, and does not wait for torch
    "models": ("Classifier", "SuperResUNet", "UNet", "build_classifier", "build_model"),
    "presets": ("PRESETS", "Preset"),
    "sampling": ("sample",),
    "training": ("train", "train_classifier"),
}


def __getattr__(name: str) -> Any:
    # Import on first use: `fastdiff --help` must not wait for torch, nor a kernel for Pillow.
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fastdiff.{home}"), name)
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
