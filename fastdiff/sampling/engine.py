"""Prepares a checkpoint for sampling: selects the timesteps, casts the weights once, compiles if that pays."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import SampleConfig, Sampler
from fastdiff.data import normalised, to_uint8
from fastdiff.diffusion import Philox, build_diffusion
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.generate import Int64Array, OfImages, batch_slices, generate
from fastdiff.sampling.guidance import guided
from fastdiff.sampling.output import Uint8Array

SUPER_RES_KEY = 0x9E3779B97F4A7C15
"""Added to the seed of a super-resolution model, whose noise must be independent of the base image's."""


class Engine:
    """Draws the images of a checkpoint by their numbers.

    ``images`` is the number of images to expect, which decides whether compilation pays. The engine takes ownership of
    the checkpoint's model and casts its weights. ValueError if ``config`` asks for timesteps that the diffusion process
    does not have.
    """

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig, runtime: Runtime, images: int) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        process = checkpoint.diffusion_config
        if config.respacing is not None:
            process = replace(process, timestep_respacing=config.respacing)
        self.diffusion = build_diffusion(process, runtime.kernels)
        self.steps = self.diffusion.num_timesteps
        shift = SUPER_RES_KEY if checkpoint.model_config.small_size else 0
        self.config = replace(config, seed=(config.seed + shift) % 2**64)
        calls = len(batch_slices(images, config.batch_size)) * self.steps if images else 0
        self.calls = 2 * calls if config.sampler is Sampler.HEUN else calls
        self._module = runtime.cast(checkpoint.model.eval())
        self._model = runtime.prepare(self._module, self.calls)

    def draw(
        self,
        indices: Int64Array,
        labels: Int64Array | None = None,
        *,
        low_res: OfImages | None = None,
        start: OfImages | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[Uint8Array]:
        """Yield the images ``indices`` (N,) of the classes ``labels`` (N,), uint8 (n, H, W, 3); see ``generate``."""
        return self._generate(self._model, indices, labels, low_res=low_res, start=start, on_step=on_step)

    def trajectory(
        self, index: int, label: int | None, most: int, low_res: OfImages | None = None, start: OfImages | None = None
    ) -> Uint8Array:
        """At most ``most`` evenly spread frames uint8 (F, H, W, 3) of the image ``index`` from x_T to x_0."""
        chosen = np.linspace(self.steps, 0, min(self.steps + 1, most)).round().astype(int).tolist()
        frames: list[Uint8Array] = []
        seen = 0

        def watch(x: Tensor) -> None:
            nonlocal seen
            if seen in chosen:
                frames.append(to_uint8(x)[0].cpu().numpy())
            seen += 1

        labels = None if label is None else np.array([label])
        model = self.runtime.eager(self._module)  # a batch of one would be compiled again
        for _ in self._generate(model, np.array([index]), labels, low_res=low_res, start=start, watch=watch):
            pass
        return np.stack(frames)

    def _generate(
        self,
        model: Callable[..., Tensor],
        indices: Int64Array,
        labels: Int64Array | None,
        *,
        low_res: OfImages | None,
        start: OfImages | None,
        on_step: Callable[[int], None] | None = None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Uint8Array]:
        config = self.checkpoint.model_config
        return generate(
            model,
            self.diffusion,
            self.config,
            image_size=config.image_size,
            device=self.runtime.device,
            indices=indices,
            labels=labels if config.class_cond else None,
            low_res=low_res,
            start=start,
            on_step=on_step,
            watch=watch,
            graphs=True,
        )

    def encode(self, images: Uint8Array, labels: Int64Array | None = None) -> Tensor:
        """x_T, fp32 (N, 3, H, W), of images uint8 (N, H, W, 3) by reverse DDIM (Song et al. 2021, section 4.3)."""
        x = normalised(torch.from_numpy(images)).to(self.runtime.device)
        conditions = {} if labels is None else {"y": torch.from_numpy(labels).to(x.device)}
        model = self.runtime.eager(self._module)
        if labels is not None and self.config.guidance_scale != 1:
            model = guided(model, self.config.guidance_scale)  # as in decoding
        clip = self.config.clip_denoised
        return self.diffusion.ddim_reverse_sample_loop(model, x, clip_denoised=clip, model_kwargs=conditions)

    def noise_of(self, seed: int) -> Tensor:
        """x_T, fp32 (1, 3, H, W), of the first image that ``seed`` draws."""
        size = self.checkpoint.model_config.image_size
        first = Philox(seed, torch.zeros(1, dtype=torch.int64, device=self.runtime.device))
        return first.of_start((1, 3, size, size), self.diffusion.kernels)
