"""What the parity tests share: the golden files, the weights that they assume, and how results are compared."""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import (
    ClassifierConfig,
    DiffusionConfig,
    GaussianDiffusion,
    LossType,
    ModelConfig,
    ModelMeanType,
    ModelVarType,
    build_classifier,
    build_model,
    space_timesteps,
)
from fastdiff.diffusion.schedule import get_named_beta_schedule

GOLDEN = Path(__file__).parent / "golden"

ENGINES = [("reference", "contiguous"), ("torch", "channels_last"), ("triton", "channels_last")]
"""The implementations, each with the memory format that it is used with; without a GPU, Triton's are interpreted."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.backends.cudnn.allow_tf32 = False  # PyTorch would let convolutions round their inputs to 10 bits


def golden_names(pattern: str) -> list[str]:
    """The golden files that match ``pattern``; a test without any would pass unseen."""
    names = sorted(path.name for path in GOLDEN.glob(pattern))
    assert names, f"no golden file matches {pattern}"
    return names


def load(name: str) -> dict[str, Any]:
    """A golden npz file as a dict, its JSON strings parsed."""
    with np.load(GOLDEN / name) as file:
        arrays = {key: file[key] for key in file.files}
    return {
        key: json.loads(str(a)) if a.ndim == 0 and a.dtype.kind == "U" else a.item() if a.ndim == 0 else a
        for key, a in arrays.items()
    }


def load_json(name: str) -> Any:
    """A golden JSON file."""
    return json.loads((GOLDEN / name).read_text())


def tensor_for(key: str, shape: Iterable[int]) -> np.ndarray:
    """The weight that every golden result assumes for this state-dict key (golden/README.md)."""
    shape = tuple(shape)
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return (1 + 0.1 * z).astype(np.float32) if key.endswith("weight") else (0.1 * z).astype(np.float32)
    if key == "label_emb.weight":
        return (0.1 * z).astype(np.float32)
    return (z / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def projection(key: str, tensor: torch.Tensor) -> float:
    """The component of ``tensor`` along the random direction that belongs to ``key`` (golden/README.md)."""
    r, norm = _direction(key, tuple(tensor.shape))
    return float((tensor.detach().double().cpu().numpy() * r).sum() / norm)


@cache
def _direction(key: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.floating[Any]]:
    """Drawn once: weights, gradients and averages of one model are seen along the same directions."""
    r = np.random.default_rng(zlib.crc32(("proj:" + key).encode())).standard_normal(shape)
    return r, np.linalg.norm(r)


def model_config(flags: Mapping[str, Any]) -> ModelConfig:
    """The model half of the original's flags."""
    names = {f.name for f in fields(ModelConfig)}
    chosen = {name: value for name, value in flags.items() if name in names}
    if "large_size" in flags:
        chosen["image_size"] = flags["large_size"]
    return ModelConfig(**chosen)


def diffusion_config(flags: Mapping[str, Any]) -> DiffusionConfig:
    """The process half of the original's flags."""
    names = {f.name for f in fields(DiffusionConfig)}
    return DiffusionConfig(**{name: value for name, value in flags.items() if name in names})


def golden_model(flags: Mapping[str, Any], kernels: str, memory_format: str) -> torch.nn.Module:
    """A float32 model with these flags and the golden weights."""
    return golden(build_model(model_config(flags), kernels=kernels, memory_format=memory_format))


def classifier_config(flags: Mapping[str, Any]) -> ClassifierConfig:
    """The classifier half of guided-diffusion's flags."""
    names = {f.name for f in fields(ClassifierConfig)}
    return ClassifierConfig(**{name: value for name, value in flags.items() if name in names})


def golden_classifier(flags: Mapping[str, Any], kernels: str, memory_format: str) -> torch.nn.Module:
    """A float32 classifier with these flags and the golden weights."""
    return golden(build_classifier(classifier_config(flags), kernels=kernels, memory_format=memory_format))


def golden(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the golden weights, on the device."""
    state = {key: torch.from_numpy(tensor_for(key, value.shape)) for key, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.to(DEVICE)


def tensor(array: np.ndarray) -> torch.Tensor:
    """The array on the device that the models are on."""
    return torch.from_numpy(array).to(DEVICE)


def golden_diffusion(config: Mapping[str, Any]) -> GaussianDiffusion:
    """The process that a golden file's ``config`` describes."""
    steps, respacing = config["diffusion_steps"], config["timestep_respacing"]
    return GaussianDiffusion(
        betas=get_named_beta_schedule(config["noise_schedule"], steps),
        model_mean_type=ModelMeanType[config["mean_type"]],
        model_var_type=ModelVarType[config["var_type"]],
        loss_type=LossType[config["loss_type"]],
        rescale_timesteps=config["rescale_timesteps"],
        use_timesteps=space_timesteps(steps, respacing) if respacing else None,
    )


def error_per_sample(actual: torch.Tensor | np.ndarray, golden: np.ndarray) -> np.ndarray:
    """||actual - golden|| / ||golden|| for each sample; a golden zero wants an exact zero."""
    found = (
        actual.detach().double().cpu().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual, np.float64)
    )
    assert found.shape == golden.shape
    flat = (len(golden), -1)
    distance = np.linalg.norm((found - golden).reshape(flat), axis=1)
    size = np.linalg.norm(golden.astype(np.float64).reshape(flat), axis=1)
    return np.where(distance == 0, 0.0, distance / np.where(size == 0, np.finfo(np.float64).tiny, size))


def assert_close(
    actual: torch.Tensor | np.ndarray, golden: np.ndarray, limit: float | np.ndarray, what: str = "result"
) -> None:
    """Hold every sample to its own limit: one norm over a batch would hide the small ones."""
    error = error_per_sample(actual, golden)
    assert (error <= limit).all(), f"{what}: errors {error} over the limit {limit}"


def float32_limit(data: Mapping[str, Any], key: str) -> np.ndarray:
    """Twice the error that the original itself makes in float32, but at least 1e-5."""
    return np.maximum(1e-5, 2 * data["err32_" + key])
