"""A model checkpoint: weights and configuration in one file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.files import read_tensors, write_tensors
from fastdiff.checkpoint.finding import find_checkpoint
from fastdiff.checkpoint.steps import replace_file, verify_file
from fastdiff.config import ClassifierConfig, DiffusionConfig, Kernels, MemoryFormat, ModelConfig, with_multipliers
from fastdiff.data.classes import composed
from fastdiff.diffusion import GaussianDiffusion, build_diffusion
from fastdiff.interop import openai
from fastdiff.interop.recognition import describe
from fastdiff.models import UNet, build_model
from fastdiff.models.unet import Encoder

C = TypeVar("C", ModelConfig, ClassifierConfig)


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to use, with the configurations and metadata of its file."""

    model: UNet
    diffusion: GaussianDiffusion
    model_config: ModelConfig
    diffusion_config: DiffusionConfig
    step: int
    class_names: tuple[str, ...]
    metadata: Mapping[str, Any]


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    *,
    model_config: ModelConfig,
    diffusion_config: DiffusionConfig,
    step: int = 0,
    class_names: tuple[str, ...] = (),
    **metadata: Any,
) -> Path:
    """Write a model, or its state dict, with its configuration; further keywords become metadata (JSON values).

    The write is atomic. OSError if the file cannot be written, ValueError if for_inference() has changed the model.
    """
    state = state_of(model)
    return write_tensors(
        Path(path), state, model_metadata(model_config, diffusion_config, step, class_names, **metadata)
    )


def state_of(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict of a model, or a given one; ValueError if for_inference() has changed the model."""
    if isinstance(model, Encoder) and model.emb_layers is not None:
        raise ValueError("the model is for inference only: save it before for_inference()")
    return model.state_dict() if isinstance(model, nn.Module) else model


def add_metadata(path: Path, **metadata: Any) -> None:
    """Add JSON values to the metadata of a model's file, or replace them; the rest of the file stays as it is.

    The replacement is atomic, also in a run folder (``replace_file``). ValueError as refuse_frozen's, or if the file is
    damaged; OSError if it cannot be written.
    """
    refuse_frozen(path)
    state, before = read_tensors(path, kind="model", verified=verify_file(path))
    replace_file(path, lambda temporary: write_tensors(temporary, state, {**before, **metadata}))


def refuse_frozen(path: Path) -> None:
    """ValueError if a checkpoint's file holds no metadata, or neither it nor its folder may be written to."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} holds tensors only: fastdiff convert {path} FILE.safetensors, and name that")
    if not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} is read-only: copy it, or allow to write to it and its folder (chmod u+w)")


def model_metadata(
    config: ModelConfig | ClassifierConfig,
    diffusion_config: DiffusionConfig | None,
    step: int,
    class_names: tuple[str, ...] = (),
    **metadata: Any,
) -> dict[str, Any]:
    """The metadata of a model's or classifier's file, as JSON-compatible values."""
    kind = "classifier" if isinstance(config, ClassifierConfig) else "model"
    return {
        "kind": kind,
        f"{kind}_config": with_multipliers(config).to_dict(),
        "diffusion_config": None if diffusion_config is None else diffusion_config.to_dict(),
        "step": step,
        "class_names": list(class_names),
        **metadata,
    }


def configurations_of(
    metadata: Mapping[str, Any], path: Path, kind: type[C]
) -> tuple[C, DiffusionConfig | None, tuple[str, ...]]:
    """The inverse of model_metadata: the configurations, that of the model of class ``kind``, and the class names.

    ValueError if this version does not support them.
    """
    try:
        process = metadata["diffusion_config"]
        return (
            kind.from_dict(metadata["classifier_config" if kind is ClassifierConfig else "model_config"]),
            None if process is None else DiffusionConfig.from_dict(process),
            tuple(map(composed, metadata["class_names"])),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds a configuration that this version does not support: {error}") from None


@dataclass(frozen=True, eq=False)
class Weights:
    """A file's state dict, on the CPU, with the configurations and metadata of its model."""

    path: Path
    state: dict[str, Tensor]
    model_config: ModelConfig
    diffusion_config: DiffusionConfig
    class_names: tuple[str, ...]
    metadata: Mapping[str, Any]


def read_weights(
    place: str | os.PathLike[str],
    *,
    ema_rate: float | None = None,
    ema_length: float | None = None,
    model_config: ModelConfig | None = None,
    diffusion_config: DiffusionConfig | None = None,
    given: Mapping[str, Any] | None = None,
) -> Weights:
    """The weights and configurations that load_checkpoint builds a model from; same arguments and errors."""
    path = find_checkpoint(place, ema_rate=ema_rate, ema_length=ema_length)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        state, metadata = read_tensors(path, kind="model", verified=verify_file(path))
        if model_config is not None or diffusion_config is not None or given:
            raise ValueError(f"{path} already contains its configuration: give one only for bare state dicts")
        model_config, diffusion_config, class_names = configurations_of(metadata, path, ModelConfig)
        if diffusion_config is None:
            raise ValueError(f"{path} has no diffusion_config in its metadata: save it with save_checkpoint")
    else:
        state, metadata, class_names = openai.load_state_dict(path), openai.said_by_name(path), ()
        if model_config is None or diffusion_config is None:
            said: dict[str, Any] = {}
            for config in (model_config, diffusion_config):
                said |= config.to_dict() if config is not None else {}
            model_config, diffusion_config = describe(state, path, said | dict(given or {}))
    return Weights(path, state, model_config, diffusion_config, class_names, metadata)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    ema_rate: float | None = None,
    ema_length: float | None = None,
    model_config: ModelConfig | None = None,
    diffusion_config: DiffusionConfig | None = None,
    given: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels | str = Kernels.AUTO,
    memory_format: MemoryFormat | str = MemoryFormat.CONTIGUOUS,
) -> Checkpoint:
    """Load a fastdiff checkpoint, or a ``.pt`` state dict of improved- or guided-diffusion, which is recognised.

    ``path`` is a file, a run folder (its newest step) or ``run@step``. In a folder ``ema_rate`` selects the EMA: 0 is
    the raw weights, and the default is the highest rate; ``ema_length`` selects a power-function average instead, as
    find_checkpoint does. Settings that a state dict does not determine come from the two configurations or from
    ``given``, fields of either by name; the error names those that are still missing.

    The model is on ``device``, in evaluation mode. ValueError, in one line, if the file is missing, damaged (its
    SHA-256 is checked), or of another kind or architecture, or, for a bare state dict, if a setting is missing or
    contradicts the tensors.
    """
    weights = read_weights(
        path,
        ema_rate=ema_rate,
        ema_length=ema_length,
        model_config=model_config,
        diffusion_config=diffusion_config,
        given=given,
    )
    model = build_model(weights.model_config, kernels, memory_format)
    load_weights(model, weights.state, weights.path)
    return Checkpoint(
        model.eval().to(device),
        build_diffusion(weights.diffusion_config, kernels),
        weights.model_config,
        weights.diffusion_config,
        weights.metadata.get("step", 0),
        weights.class_names,
        weights.metadata,
    )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy a state dict into a model; ValueError, naming the first difference, if the architectures differ."""
    refuse_other_architecture(model.state_dict(), state, path)
    model.load_state_dict(dict(state))


def refuse_other_architecture(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError, naming the first difference, if a file's state dict has other keys or shapes than ``own``."""
    wanted = {key: value.shape for key, value in own.items()}
    theirs = {key: value.shape for key, value in state.items()}
    if wanted != theirs:
        key = next(key for key in [*wanted, *theirs] if wanted.get(key) != theirs.get(key))
        says = [tuple(shapes[key]) if key in shapes else "absent" for shapes in (theirs, wanted)]
        differing = sum(wanted.get(key) != theirs.get(key) for key in wanted.keys() | theirs.keys())
        raise ValueError(
            f"{path} has another architecture: {key} is {says[0]} in the file and {says[1]} in the model "
            f"({differing} tensors differ)"
        )
