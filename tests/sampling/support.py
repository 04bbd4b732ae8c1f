"""Models with random weights everywhere, so that every input has its effect, and plain arithmetic to draw in."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import (
    Checkpoint,
    Classifier,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    build_classifier,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from fastdiff.config import RuntimeConfig, SampleConfig
from fastdiff.models import UNet
from fastdiff.runtime.device import Runtime
from fastdiff.sampling import Engine, Plan

from ..support import randomise

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "zebra")
MODEL = ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=())
CLASSES: dict[str, Any] = {"class_cond": True, "num_classes": 3, "class_names": NAMES}
UPPER: dict[str, Any] = {"image_size": 16, "small_size": 8}
# x_0 as it is predicted: what an untrained net says of the noise becomes an image of black and white
PROCESS = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine", predict_xstart=True)
NOISE: dict[str, Any] = {"prediction": "epsilon", "predict_xstart": False}
SMOOTH: dict[str, Any] = {"diffusion_steps": 160, "noise_schedule": "linear", **NOISE, "last": 0.03}
"""A model whose path from noise to image and back is a smooth one; to be drawn from unclipped."""


def model_of(config: ModelConfig, seed: int = 0, last: float = 1.0) -> UNet:
    """The same weights for the same seed, those of the last layer times ``last``."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = randomise(build_model(config).eval())
        for p in model.out.parameters():
            p.mul_(last)
    return model


def classifier_of(classes: int) -> Classifier:
    """A classifier of 8-pixel images with random weights everywhere, which decides strongly."""
    config = ClassifierConfig(
        image_size=8,
        classifier_width=64,
        classifier_depth=1,
        channel_mult=(1,),
        classifier_attention_resolutions=(),
        num_classes=classes,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = randomise(build_classifier(config).eval()).requires_grad_(False)
        for parameter in model.out.parameters():
            parameter.mul_(4)
    return model


def saved(path: Path, seed: int = 0, last: float = 1.0, **flags: Any) -> Path:
    """A checkpoint of 8 pixels; ``flags`` are fields of the configurations, and what else the file is to say."""

    def chosen(config: Any) -> Any:
        return replace(config, **{f.name: flags[f.name] for f in fields(config) if f.name in flags})

    model, process = chosen(MODEL), chosen(PROCESS)
    more = {k: v for k, v in flags.items() if k not in {**MODEL.to_dict(), **PROCESS.to_dict()}}
    weights = model_of(model, seed, last)
    return save_checkpoint(path, weights, model_config=model, diffusion_config=process, step=7, **more)


def loaded(tmp_path: Path, **flags: Any) -> Checkpoint:
    return load_checkpoint(saved(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors", **flags))


def runtime(precision: str = "fp32") -> Runtime:
    return Runtime.resolve(RuntimeConfig(device="cpu", precision=precision, compile="off"))


def plan(checkpoint: Checkpoint, config: SampleConfig, **choices: Any) -> Plan:
    absent: dict[str, Any] = {"num_samples": None, "base_samples": None, "super_res": None, "ends": None}
    return Plan.of(checkpoint, config, **{**absent, "classes": (), **choices})


def drawn(subject: Engine, count: int, labels: np.ndarray | None = None, **more: Any) -> np.ndarray:
    return np.concatenate(list(subject.draw(np.arange(count), labels, **more)))


def command(*args: object) -> None:
    """``fastdiff ...`` in this process."""
    from fastdiff.cli.app import app

    assert app(list(map(str, args)), standalone_mode=False) == 0
