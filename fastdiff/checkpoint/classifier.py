"""A classifier's checkpoint: weights, architecture and the diffusion process whose noisy images it was trained on."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoint.files import read_metadata, read_tensors, write_tensors
from fastdiff.checkpoint.finding import find_checkpoint
from fastdiff.checkpoint.model import configurations_of, load_weights, model_metadata, state_of
from fastdiff.checkpoint.steps import verify_file
from fastdiff.config import ClassifierConfig, DiffusionConfig, Kernels, MemoryFormat, with_multipliers
from fastdiff.config.base import refuse_contradiction
from fastdiff.interop import openai
from fastdiff.interop.classifier import describe_classifier
from fastdiff.interop.recognition import classifier_pool
from fastdiff.models import Classifier, build_classifier


@dataclass(frozen=True)
class ClassifierCheckpoint:
    """A classifier that is ready to use, with the configuration and metadata of its file.

    ``diffusion_config`` is the process that it was trained on; None if the file does not say.
    """

    model: Classifier
    config: ClassifierConfig
    diffusion_config: DiffusionConfig | None
    step: int
    class_names: tuple[str, ...]
    metadata: Mapping[str, Any]


def save_classifier(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    *,
    config: ClassifierConfig,
    diffusion_config: DiffusionConfig | None = None,
    step: int = 0,
    class_names: tuple[str, ...] = (),
    **metadata: Any,
) -> Path:
    """Write a classifier, or its state dict, with its configuration; further keywords become metadata (JSON values).

    The write is atomic. OSError if the file cannot be written, ValueError if for_inference() has changed the model.
    """
    state = state_of(model)
    return write_tensors(Path(path), state, model_metadata(config, diffusion_config, step, class_names, **metadata))


@dataclass(frozen=True, eq=False)
class ClassifierWeights:
    """A classifier's state dict, on the CPU, with the configurations and metadata of its file."""

    path: Path
    state: dict[str, Tensor]
    config: ClassifierConfig
    diffusion_config: DiffusionConfig | None
    class_names: tuple[str, ...]
    metadata: Mapping[str, Any]


def read_classifier(
    place: str | os.PathLike[str], *, config: ClassifierConfig | None = None, given: Mapping[str, Any] | None = None
) -> ClassifierWeights:
    """The weights and configurations that load_classifier builds a classifier from; same arguments and errors."""
    path = find_checkpoint(place)
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    said = {} if config is None else with_multipliers(config).to_dict()
    said |= {name: value for name, value in (given or {}).items() if value is not None}
    if path.suffix != ".safetensors":
        state = openai.load_state_dict(path)
        described = describe_classifier(state, path, said)
        return ClassifierWeights(path, state, described, None, (), openai.said_by_name(path))
    state, metadata = read_tensors(path, kind="classifier", verified=verify_file(path))
    described, diffusion_config, class_names = configurations_of(metadata, path, ClassifierConfig)
    refuse_contradiction(said, str(path), described)
    return ClassifierWeights(path, state, described, diffusion_config, class_names, metadata)


def is_classifier(path: Path) -> bool:
    """Whether a ``.safetensors`` or ``.pt`` file holds a classifier; ValueError if it cannot be read."""
    if path.suffix == ".safetensors":
        return bool(read_metadata(path)["kind"] == "classifier")
    return classifier_pool(openai.load_state_dict(path)) is not None


def load_classifier(
    place: str | os.PathLike[str],
    *,
    config: ClassifierConfig | None = None,
    given: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    kernels: Kernels | str = Kernels.AUTO,
    memory_format: MemoryFormat | str = MemoryFormat.CONTIGUOUS,
) -> ClassifierCheckpoint:
    """Load a classifier of fastdiff, or a ``.pt`` state dict of guided-diffusion, whose architecture is recognised.

    ``place`` is a file, a classifier's run folder (its newest step) or ``run@step``. ``config`` or ``given``, fields of
    ClassifierConfig by name, say what a state dict does not determine.

    The model is on ``device``, in evaluation mode. ValueError, in one line, if the file is missing, damaged (its
    SHA-256 is checked), or not a classifier, if a setting contradicts it, or if a bare state dict leaves one open.
    """
    weights = read_classifier(place, config=config, given=given)
    model = build_classifier(weights.config, kernels, memory_format)
    load_weights(model, weights.state, weights.path)
    return ClassifierCheckpoint(
        model.eval().to(device),
        weights.config,
        weights.diffusion_config,
        weights.metadata.get("step", 0),
        weights.class_names,
        weights.metadata,
    )
