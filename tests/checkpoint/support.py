"""A model of a few weights, and what a folder holds."""

from pathlib import Path
from typing import Any

import torch

from fastdiff import DiffusionConfig, ModelConfig, build_model, save_checkpoint

MODEL = ModelConfig(image_size=8, num_channels=32, num_res_blocks=1, channel_mult=(1,), class_cond=True, num_classes=3)
DIFFUSION = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine", timestep_respacing="5")


def save(path: Path, config: ModelConfig = MODEL, **metadata: Any) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(path, build_model(config), model_config=config, diffusion_config=DIFFUSION, **metadata)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
