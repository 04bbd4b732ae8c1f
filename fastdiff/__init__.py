"""fastdiff: a fast engine to train and sample pixel-space diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from fastdiff.config import (
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
    from fastdiff.models import SuperResUNet, UNet, build_model
    from fastdiff.presets import PRESETS, Preset

__version__ = "0.1.0"

_HOMES = {
    "checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "config": ("DataConfig", "DiffusionConfig", "ModelConfig", "RuntimeConfig", "SampleConfig", "TrainConfig"),
    "data": ("ImageFolder",),
    "diffusion": (
        "GaussianDiffusion",
        "LossSecondMomentSampler",
        "LossType",
        "ModelMeanType",
        "ModelVarType",
        "UniformSampler",
        "build_diffusion",
        "space_timesteps",
    ),
    "models": ("SuperResUNet", "UNet", "build_model"),
    "presets": ("PRESETS", "Preset"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604  # the names of the table, and of the type checker's imports
    *_HOME_OF,
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Looked up on first use: `fastdiff --help` must not wait for torch.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    return getattr(import_module(f"fastdiff.{_HOME_OF[name]}"), name)
