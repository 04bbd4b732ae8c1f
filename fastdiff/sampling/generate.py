"""Drawing images batch by batch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.config import SampleConfig, Sampler
from fastdiff.diffusion import GaussianDiffusion, Philox

Uint8Array = NDArray[np.uint8]


def generate(
    model: Callable[..., Tensor],
    diffusion: GaussianDiffusion,
    config: SampleConfig,
    *,
    image_size: int,
    device: torch.device,
    indices: NDArray[np.int64] | None = None,
    labels: NDArray[np.int64] | None = None,
    low_res: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Uint8Array]:
    """Yield batches of images, uint8 (n, H, W, 3), num_samples in all.

    ``indices`` (num_samples,) are the images' numbers, by default 0, 1, 2, ...; ``labels`` (num_samples,) the classes
    of a class-conditional model's images; ``low_res`` (num_samples, 3, h, w) in [-1, 1] the inputs of a
    super-resolution model. ``on_step`` is told after each step how many images took it.

    The noise of an image is a function of seed and index alone (fastdiff.kernels.philox): the same seed draws the same
    image whatever the batch size.
    """
    total, batch_size = config.num_samples, min(config.batch_size, config.num_samples)
    shape = (3, image_size, image_size)
    loops: dict[Sampler, Callable[..., Iterator[dict[str, Tensor]]]] = {
        Sampler.DDPM: diffusion.p_sample_loop_progressive,
        Sampler.DDIM: partial(diffusion.ddim_sample_loop_progressive, eta=config.eta),
        Sampler.DPM: diffusion.dpm_solver_sample_loop_progressive,
        Sampler.DPM_SDE: partial(diffusion.dpm_solver_sample_loop_progressive, sde=True),
        Sampler.HEUN: diffusion.heun_sample_loop_progressive,
    }
    for start in range(0, total, batch_size):
        wanted = min(batch_size, total - start)
        # A last batch that is not full is filled up with more images: another shape would compile the model again.
        rows = np.arange(start, start + batch_size) % total
        numbers = torch.from_numpy(rows if indices is None else indices[rows]).to(device)
        conditions: dict[str, Any] = {}
        if labels is not None:
            conditions["y"] = torch.from_numpy(labels[rows]).to(device)
        if low_res is not None:
            conditions["low_res"] = low_res[torch.from_numpy(rows)].to(device)

        noise = Philox(config.seed, numbers)
        options = {
            "noise": noise,
            "step_noise": noise,
            "device": device,
            "clip_denoised": config.clip_denoised,
            "model_kwargs": conditions,
            "pred_xstart": False,
        }
        images = (batch_size, *shape)
        for out in loops[config.sampler](model, images, **options):
            sample = out["sample"]
            if on_step is not None:
                on_step(wanted)
        if not bool(sample.isfinite().all()):
            raise ValueError("the model drew numbers that are not finite: its weights are damaged, or need fp32")
        yield to_uint8(sample)[:wanted]


def to_uint8(images: Tensor) -> Uint8Array:
    """(N, 3, H, W) in [-1, 1] as uint8 (N, H, W, 3), as improved-diffusion rounds: towards zero."""
    pixels = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
