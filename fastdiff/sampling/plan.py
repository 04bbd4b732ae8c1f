"""What a job draws: the models, the classes and the starting points."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoint import Checkpoint
from fastdiff.config import ClassMix, SampleConfig
from fastdiff.data import load
from fastdiff.data.classes import renumbered
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.base_samples import BaseSamples, load_base_samples
from fastdiff.sampling.classes import labels_of, names_of
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.loop import Int64Array, OfImages, to_device


@dataclass(frozen=True, eq=False)
class Plan:
    """Defines the images of the numbers 0, 1, 2, ...

    ``super_res`` enlarges the images of ``checkpoint``; ``base`` holds the images that a super-resolution checkpoint
    enlarges; ``ends`` are two seeds or image files to interpolate between. ``classes`` (names or indices) are drawn in
    turn; without them ``config.class_mix`` decides. ValueError if these are incompatible.
    """

    checkpoint: Checkpoint
    config: SampleConfig
    super_res: Checkpoint | None = None
    base: BaseSamples | None = None
    ends: tuple[str, str] | None = None
    classes: Sequence[str | int] = ()

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        config: SampleConfig,
        *,
        num_samples: int | None,
        base_samples: Path | None,
        super_res: Checkpoint | None,
        ends: tuple[str, str] | None,
        classes: Sequence[str | int],
    ) -> Self:
        """Create a plan: load the base samples and, unless ``num_samples`` is given, draw one image for each."""
        base = None
        if base_samples is not None:
            model = checkpoint.model_config
            if not model.small_size:
                raise ValueError("base_samples: this is not a super-resolution model and enlarges no images")
            names = checkpoint.class_names if model.class_cond else None
            base = load_base_samples(base_samples, model.small_size, names, model.num_classes)
            num_samples = len(base) if num_samples is None else num_samples
        if num_samples is not None:
            config = replace(config, num_samples=num_samples)
        return cls(checkpoint, config, super_res, base, ends, classes)

    def __post_init__(self) -> None:
        enlarges = self.checkpoint.model_config.small_size
        if enlarges and self.base is None:
            raise ValueError(
                "this is a super-resolution model: give it images to enlarge with --base-samples, or draw them with a "
                f"model of {enlarges} pixels (fastdiff sample BASE --super-res THIS)"
            )
        _refuse_guidance(self.checkpoint, self.config)
        if self.base is not None and self.super_res is not None:
            raise ValueError("super_res: not after base_samples; enlarge the images again with a second command")
        if self.super_res is not None:
            _refuse_unlike(self.checkpoint, self.super_res)
        if self.base is not None and self.classes:
            raise ValueError(f"class {self.classes[0]}: the images have the classes of the base samples")
        if self.ends is not None:
            self._check_ends(self.ends)
        if self.config.class_mix is not ClassMix.BALANCED:
            self._refuse_mix()

    def _refuse_mix(self) -> None:
        reasons = {
            "class already selects the classes": bool(self.classes),
            "the base samples have their own classes": self.base is not None,
            "this model was trained without classes": not self.checkpoint.model_config.class_cond,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"class_mix {self.config.class_mix}: {reason}; leave it out")

    def _check_ends(self, ends: tuple[str, str]) -> None:
        config = self.config
        for end in ends:
            if not (end.isdecimal() and int(end) < 2**64) and not Path(end).is_file():
                raise ValueError(f"interpolate {end}: neither a seed nor an image file")
        if config.sampler.stochastic or config.eta:
            raise ValueError(
                "interpolate needs a deterministic sampler: use --sampler ddim, dpm++ or heun, without eta"
            )
        if self.base is not None or self.super_res is not None:
            raise ValueError("interpolate: not with a super-resolution model; enlarge the images afterwards")
        if self.checkpoint.model_config.class_cond and len(self.classes) != 1:
            raise ValueError("interpolate: this model has classes: name the class of these images with --class")

    @property
    def image_size(self) -> int:
        """The side of the images in pixels."""
        return (self.super_res or self.checkpoint).model_config.image_size

    def labels(self, indices: Int64Array) -> Int64Array | None:
        """The class indices (N,) of the images ``indices`` (N,), None without classes; ValueError if one is unknown."""
        if self.ends is not None and not np.array_equal(indices, np.arange(self.config.num_samples)):
            raise ValueError("indices: not with interpolate, whose images are numbered from one end to the other")
        if self.base is not None:
            return self.base.labels_of(indices)
        labels = labels_of(self.checkpoint, indices, self.classes, self.config.class_mix, self.config.seed)
        if labels is not None and self.super_res is not None and self.super_res.model_config.class_cond:
            self._upper_labels(labels)  # names a missing class before anything is drawn
        return labels

    def engine(self, runtime: Runtime, images: int) -> Engine:
        """An engine that draws ``images`` images of this plan; it takes ownership of the models."""
        engine = Engine(self.checkpoint, self.config, runtime, images, base=self.base)
        if self.ends is not None:
            engine.start = self._between(engine, self.ends)
        if self.super_res is None:
            return engine
        config = self.config
        if not self.super_res.metadata.get("label_dropout"):
            config = replace(config, guidance_scale=1.0)  # the base model decides what the image shows
        upper = self._upper_labels if self.super_res.model_config.class_cond else None
        return Engine(self.super_res, config, runtime, images, base=engine, upper_labels=upper)

    def _upper_labels(self, labels: Int64Array) -> Int64Array:
        """Convert class indices of the base to those of super_res; ValueError if it lacks a class."""
        assert self.super_res is not None
        names, count = self.super_res.class_names, self.super_res.model_config.num_classes
        remedy = "draw classes that it was trained on (--class)"
        return renumbered(labels, names_of(self.checkpoint), names, count, "the base", remedy, npz=True)

    def _between(self, engine: Engine, ends: tuple[str, str]) -> OfImages:
        """x_T of the images 0 to num_samples - 1, interpolated from one endpoint to the other."""
        first, second = (self._latent(engine, end) for end in ends)
        last = max(self.config.num_samples - 1, 1)

        def start(numbers: Int64Array) -> Tensor:
            weights = torch.from_numpy(numbers / last).float()
            return slerp(first, second, to_device(weights, first.device))

        return start

    def _latent(self, engine: Engine, end: str) -> Tensor:
        if end.isdecimal():
            return engine.noise_of(int(end))
        image = load(end, self.checkpoint.model_config.image_size)
        labels = labels_of(self.checkpoint, np.zeros(1, dtype=np.int64), self.classes)
        return engine.encode(image[None], labels)


def _refuse_guidance(checkpoint: Checkpoint, config: SampleConfig) -> None:
    asked = f"guidance_scale {config.guidance_scale:g}: this model was trained without"
    if config.guidance_scale != 1 and not checkpoint.model_config.class_cond:
        raise ValueError(f"{asked} classes (class_cond)")
    if config.guidance_scale != 1 and not checkpoint.metadata.get("label_dropout"):
        raise ValueError(f"{asked} label dropout, so it cannot predict without a class: train with --label-dropout 0.1")


def _refuse_unlike(base: Checkpoint, upper: Checkpoint) -> None:
    small, large = base.model_config, upper.model_config
    if not large.small_size:
        raise ValueError("super_res: this is not a super-resolution model")
    if small.image_size != large.small_size:
        raise ValueError(
            f"super_res: the model enlarges images of {large.small_size} pixels, and the base draws {small.image_size}"
        )
    if large.class_cond and not small.class_cond:
        raise ValueError(f"super_res: the model has {large.num_classes} classes, and the base no classes")


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Interpolate spherically between two x_T (1, 3, H, W) (Shoemake 1985): (n, 3, H, W) for ``weights`` (n,).

    Linear interpolation would reduce the variance of the noise.
    """
    cosine = F.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights.view(-1, 1, 1, 1)
    near = angle < 1e-4  # sin(angle) is too small to divide by
    of_first = torch.where(near, 1 - w, torch.sin((1 - w) * angle) / torch.sin(angle))
    of_second = torch.where(near, w, torch.sin(w * angle) / torch.sin(angle))
    return of_first * first + of_second * second
