"""Prepares a checkpoint for sampling: selects the timesteps, casts the weights once, compiles if that pays."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint
from fastdiff.config import SampleConfig, Sampler
from fastdiff.data import normalised, to_uint8
from fastdiff.diffusion import Philox, build_diffusion
from fastdiff.models import Classifier, UNet
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.base_samples import BaseSamples
from fastdiff.sampling.guidance import class_gradient, guided, guided_steps, in_turn, without_class
from fastdiff.sampling.loop import Int64Array, OfImages, StopSampling, batch_slices, generate
from fastdiff.sampling.output import Uint8Array
from fastdiff.sampling.time_grids import chosen_grid

SUPER_RES_KEY = 0x9E3779B97F4A7C15
"""Added to the seed of a super-resolution model, whose noise must be independent of the base image's."""


class Engine:
    """Draws the images of a checkpoint by their numbers.

    ``images`` is the number of images to expect, which decides whether compilation pays. ``base`` supplies the inputs
    of a super-resolution model: small images, or the engine that draws them (a cascade: Nichol & Dhariwal 2021,
    section 4), whose class labels ``upper_labels`` maps to this model's. ``classifier`` guides the sampling by
    ``config.classifier_scale``, and ``guide``, a worse model of the same images, by ``config.guidance_scale``. The
    attribute ``start``, set after encoding with the engine, supplies x_T if it is not noise; ``grid`` is how the
    timesteps are spread. The engine takes ownership of the models and changes their weights in place: their order and
    precision. ValueError if ``config`` asks for timesteps that the diffusion process does not have, or for a tuned grid
    that the checkpoint does not have.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: SampleConfig,
        runtime: Runtime,
        images: int,
        *,
        base: "BaseSamples | Engine | None" = None,
        upper_labels: Callable[[Int64Array], Int64Array] | None = None,
        classifier: ClassifierCheckpoint | None = None,
        guide: Checkpoint | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.runtime = runtime
        self.base = base
        self.upper_labels = upper_labels
        self.start: OfImages | None = None
        process = checkpoint.diffusion_config
        if config.respacing is not None:
            process = replace(process, timestep_respacing=config.respacing)
        self.grid, timesteps = chosen_grid(checkpoint, config)
        self.diffusion = build_diffusion(process, runtime.kernels, timesteps)
        shift = SUPER_RES_KEY if checkpoint.model_config.small_size else 0
        self.config = replace(config, seed=(config.seed + shift) % 2**64)
        calls = len(batch_slices(images, config.batch_size)) * self.diffusion.num_timesteps if images else 0
        self.calls = 2 * calls if config.sampler is Sampler.HEUN else calls
        self._module = runtime.cast(checkpoint.model.for_inference())
        self._model = runtime.prepare(self._module, self.calls)
        self._classifier: Classifier | None = None
        self._logits: Callable[..., Tensor] | None = None
        if classifier is not None and config.classifier_scale:
            # no gradient of its weights is wanted, nor the memory that one would take
            self._classifier = runtime.cast(classifier.model.for_inference().requires_grad_(False))
            self._logits = runtime.prepare(self._classifier, self.calls)
        self._guide: UNet | None = None
        self._worse: Callable[..., Tensor] | None = None
        if guide is not None and config.guidance_scale != 1:
            self._guide = runtime.cast(guide.model.for_inference())
            self._worse = runtime.prepare(self._guide, self.calls)
        self._labelled = checkpoint.model_config.class_cond or classifier is not None

    @property
    def steps(self) -> int:
        """Steps per image, those of a base engine included."""
        return self.diffusion.num_timesteps + (self.base.steps if isinstance(self.base, Engine) else 0)

    def draw(
        self, indices: Int64Array, labels: Int64Array | None = None, on_step: Callable[[int], None] | None = None
    ) -> Iterator[Uint8Array]:
        """Yield the images ``indices`` (N,) of the classes ``labels`` (N,), uint8 (n, H, W, 3).

        ``on_step`` is called after each step with the number of images that took it; see ``generate``.
        """
        low_res: OfImages | None = None
        if isinstance(self.base, Engine):
            low_res = partial(_next_of, self.base.draw(indices, labels, on_step))  # split into the same batches
        elif self.base is not None:
            low_res = self._given
        inputs = self._inputs(indices, labels, low_res, self._logits, self._worse)
        return generate(self._without_class(self._model), self.diffusion, self.config, **inputs, on_step=on_step)

    def trajectories(self, indices: Int64Array, labels: Int64Array | None, most: int) -> Uint8Array:
        """The images ``indices`` (N,) from x_T to x_0, at most ``most`` evenly spread frames: uint8 (N, F, H, W, 3)."""
        steps = self.diffusion.num_timesteps
        chosen = np.linspace(steps, 0, min(steps + 1, most)).round().astype(int).tolist()
        frames: list[Uint8Array] = []
        seen = 0

        def watch(x: Tensor) -> None:
            nonlocal seen
            if seen in chosen:
                frames.append(to_uint8(x).cpu().numpy())
            seen += 1

        low_res: OfImages | None = self._given if self.base is not None else None
        if isinstance(self.base, Engine):
            small = normalised(torch.from_numpy(self.base.trajectories(indices, labels, 1)[:, -1]))
            low_res = lambda _: small  # noqa: E731
        # another batch size would be compiled again
        model = self.runtime.eager(self._module)
        logits = None if self._classifier is None else self.runtime.eager(self._classifier)
        worse = None if self._guide is None else self.runtime.eager(self._guide)
        config = replace(self.config, batch_size=len(indices))
        inputs = self._inputs(indices, labels, low_res, logits, worse)
        for _ in generate(self._without_class(model), self.diffusion, config, **inputs, watch=watch):
            pass
        return np.stack(frames, axis=1)

    def _without_class(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The model as ``generate`` calls it: an unconditional one gets no class, which only its classifier uses."""
        conditional = self.checkpoint.model_config.class_cond or not self._labelled
        return model if conditional else without_class(model)

    def _inputs(
        self,
        indices: Int64Array,
        labels: Int64Array | None,
        low_res: OfImages | None,
        logits: Callable[..., Tensor] | None = None,
        worse: Callable[..., Tensor] | None = None,
    ) -> dict[str, Any]:
        """The arguments of ``generate`` that follow from the models and the images."""
        config = self.checkpoint.model_config
        if labels is not None and self.upper_labels is not None:
            labels = self.upper_labels(labels)
        return {
            "image_size": config.image_size,
            "device": self.runtime.device,
            "indices": indices,
            "labels": labels if self._labelled else None,
            "low_res": low_res,
            "cond_fn": None if logits is None else class_gradient(logits, self.config.classifier_scale),
            "guide": None if worse is None else self._without_class(worse),
            "start": self.start,
            "graphs": True,
        }

    def _given(self, numbers: Int64Array) -> Tensor:
        assert isinstance(self.base, BaseSamples)
        return normalised(torch.from_numpy(self.base.batch(numbers)))

    def encode(self, images: Uint8Array, labels: Int64Array | None = None) -> Tensor:
        """x_T, fp32 (N, 3, H, W), of images uint8 (N, H, W, 3) by reverse DDIM (Song et al. 2021, section 4.3)."""
        x = normalised(torch.from_numpy(images)).to(self.runtime.device)
        conditions = {} if labels is None else {"y": torch.from_numpy(labels).to(x.device)}
        model = self.runtime.eager(self._module)
        if self.config.guidance_scale != 1 and (self._guide is not None or labels is not None):  # as in decoding
            worse = None if self._guide is None else self.runtime.eager(self._guide)
            better = guided(model, self.config.guidance_scale, worse)
            steps = guided_steps(self.diffusion, self.config.guidance_interval)
            model = in_turn([better if guides else model for guides in steps])
        clip = self.config.clip_denoised
        return self.diffusion.ddim_reverse_sample_loop(model, x, clip_denoised=clip, model_kwargs=conditions)

    def noise_of(self, seed: int) -> Tensor:
        """x_T, fp32 (1, 3, H, W), of the first image that ``seed`` draws."""
        size = self.checkpoint.model_config.image_size
        first = Philox(seed, torch.zeros(1, dtype=torch.int64, device=self.runtime.device))
        return first.of_start((1, 3, size, size), self.diffusion.kernels)


def _next_of(batches: Iterator[Uint8Array], numbers: Int64Array) -> Tensor:
    """The next batch of small images, padded to the length of ``numbers``; raises StopSampling if there is none."""
    if (images := next(batches, None)) is None:
        raise StopSampling
    return normalised(torch.from_numpy(images[np.arange(len(numbers)) % len(images)]))
