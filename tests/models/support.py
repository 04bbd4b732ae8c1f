"""What the model tests share: small models whose every weight counts."""

from typing import Any

import torch

from fastdiff.config import ModelConfig
from fastdiff.models import UNet, build_model


def small_config(**changes: Any) -> ModelConfig:
    """Two levels, 8 pixels, attention at the lower level."""
    values: dict[str, Any] = {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 2,
        "attention_resolutions": (4,),
        "channel_mult": (1, 2),
        **changes,
    }
    return ModelConfig(**values)


def small_model(kernels: str = "auto", memory_format: str = "channels_last", **changes: Any) -> UNet:
    """A model of small_config with random weights everywhere, also in the layers that begin at zero."""
    model = build_model(small_config(**changes), kernels, memory_format)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            z = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * z if p.ndim == 1 else z / p[0].numel() ** 0.5)
    return model


def inputs(model: UNet, batch: int = 2) -> dict[str, torch.Tensor]:
    """Arguments for the model."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    found = {
        "x": torch.randn(batch, 3, config.image_size, config.image_size, generator=generator),
        "timesteps": torch.linspace(3.25, 990, batch),
    }
    if config.class_cond:
        found["y"] = torch.arange(batch) % config.num_classes
    if config.small_size:
        found["low_res"] = torch.randn(batch, 3, config.small_size, config.small_size, generator=generator)
    return found
