"""A look at what the model draws while it trains."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.config import DiffusionConfig, Kernels, ModelConfig, SampleConfig, Sampler
from fastdiff.diffusion import build_diffusion
from fastdiff.sampling import generate, save_grid

IMAGES = 16
STEPS = 25


def save_preview(
    path: Path,
    model: Callable[..., Tensor],
    model_config: ModelConfig,
    diffusion_config: DiffusionConfig,
    device: torch.device,
    low_res: Tensor | None = None,
    kernels: Kernels = Kernels.AUTO,
) -> None:
    """A grid of 16 images in 25 DDIM steps from always the same noise, classes in turn."""
    steps = min(STEPS, diffusion_config.diffusion_steps)
    values = {**diffusion_config.to_dict(), "timestep_respacing": str(steps)}
    diffusion = build_diffusion(DiffusionConfig.from_dict(values), kernels)
    labels = np.arange(IMAGES) % model_config.num_classes if model_config.class_cond else None
    config = SampleConfig(num_samples=IMAGES, batch_size=IMAGES, sampler=Sampler.DDIM)
    batches = generate(
        model, diffusion, config, image_size=model_config.image_size, device=device, labels=labels, low_res=low_res
    )
    save_grid(path, np.concatenate(list(batches)))
