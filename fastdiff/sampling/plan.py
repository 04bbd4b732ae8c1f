"""What a job draws: the models, the classes and the starting points."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint
from fastdiff.config import FAST_STEPS, ClassMix, Prediction, Recipe, SampleConfig, Sampler
from fastdiff.config.base import differences
from fastdiff.data import load
from fastdiff.data.classes import renumbered
from fastdiff.diffusion import build_diffusion
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.words import printable
from fastdiff.sampling.base_samples import BaseSamples, load_base_samples
from fastdiff.sampling.classes import Classes, labels_of
from fastdiff.sampling.engine import Engine
from fastdiff.sampling.loop import Int64Array, OfImages, to_device

_PROCESS = ("diffusion_steps", "noise_schedule", "noise_shift", "zero_terminal_snr", "rescale_timesteps")


@dataclass(frozen=True, eq=False)
class Plan:
    """Defines the images of the numbers 0, 1, 2, ...

    ``classifier`` guides ``checkpoint``, which may be unconditional: then the images have the classifier's classes.
    ``guide`` is a worse model of the same images, away from which ``checkpoint`` is guided (``guided``).
    ``super_res`` enlarges the images of ``checkpoint``; ``base`` holds the images that a super-resolution checkpoint
    enlarges; ``ends`` are two seeds or image files to interpolate between. ``classes`` (names or indices) are drawn in
    turn; without them ``config.class_mix`` decides. ValueError if these are incompatible.
    """

    checkpoint: Checkpoint
    config: SampleConfig
    classifier: ClassifierCheckpoint | None = None
    super_res: Checkpoint | None = None
    base: BaseSamples | None = None
    ends: tuple[str, str] | None = None
    classes: Sequence[str | int] = ()
    guide: Checkpoint | None = None

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
        classifier: ClassifierCheckpoint | None = None,
        guide: Checkpoint | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> Self:
        """Create a plan: load the base samples and, unless ``num_samples`` is given, draw one image for each.

        ``skipped`` are files of the base samples that are left out.
        """
        base = None
        if base_samples is not None:
            model = checkpoint.model_config
            if not model.small_size:
                raise ValueError("base_samples: this is not a super-resolution model and enlarges no images")
            names = checkpoint.class_names if model.class_cond else None
            base = load_base_samples(base_samples, model.small_size, names, model.num_classes, skipped)
            num_samples = len(base) if num_samples is None else num_samples
        if num_samples is not None:
            config = replace(config, num_samples=num_samples)
        return cls(checkpoint, config, classifier, super_res, base, ends, classes, guide)

    def __post_init__(self) -> None:
        if self.classifier is not None:
            _refuse_classifier(self.checkpoint, self.classifier)
        elif self.config.classifier_scale != 1:
            raise ValueError(f"classifier_scale {self.config.classifier_scale:g}: name the classifier (--classifier)")
        enlarges = self.checkpoint.model_config.small_size
        if enlarges and self.base is None:
            raise ValueError(
                "this is a super-resolution model: give it images to enlarge with --base-samples, or draw them with a "
                f"model of {enlarges} pixels (fastdiff sample BASE --super-res THIS)"
            )
        if self.guide is not None:
            _refuse_guide(self.checkpoint, self.guide)
        else:
            _refuse_guidance(self.checkpoint, self.config)
        guided = self.config.guidance_scale != 1 or (self.classifier is not None and self.config.classifier_scale)
        if self.config.guidance_interval is not None and not guided:
            raise ValueError("guidance_interval: nothing guides these images; give --guidance-scale, or leave it out")
        flows = any(c.diffusion_config.prediction is Prediction.FLOW for c in (self.checkpoint, self.super_res) if c)
        if flows and self.config.sampler is Sampler.DDPM:
            raise ValueError(
                "sampler ddpm: the model predicts a flow, which has no ancestral steps: use --sampler dpm++ or ddim"
            )
        if self.base is not None and self.super_res is not None:
            raise ValueError("super_res: not after base_samples; enlarge the images again with a second command")
        if self.super_res is not None:
            _refuse_unlike(self.checkpoint, self.super_res, self.known is not None)
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
            "this model was trained without classes": self.known is None,
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
            deterministic = ", ".join(sampler for sampler in Sampler if not sampler.stochastic)
            raise ValueError(f"interpolate needs a deterministic sampler: use --sampler {deterministic}, without eta")
        if self.base is not None or self.super_res is not None:
            raise ValueError("interpolate: not with a super-resolution model; enlarge the images afterwards")
        if self.classifier is not None and not all(end.isdecimal() for end in ends):
            raise ValueError("interpolate: not between image files with a classifier; use seeds, or leave it out")
        if self.known is not None and len(self.classes) != 1:
            raise ValueError("interpolate: this model has classes: name the class of these images with --class")

    @property
    def known(self) -> Classes | None:
        """The classes that can be drawn, None without classes."""
        return Classes.of(self.checkpoint, self.classifier)

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
        labels = labels_of(self.known, indices, self.classes, self.config.class_mix, self.config.seed)
        if labels is not None and self.super_res is not None and self.super_res.model_config.class_cond:
            self._upper_labels(labels)  # names a missing class before anything is drawn
        return labels

    def engine(self, runtime: Runtime, images: int) -> Engine:
        """An engine that draws ``images`` images of this plan; it takes ownership of the models."""
        engine = Engine(
            self.checkpoint,
            self.config,
            runtime,
            images,
            base=self.base,
            classifier=self.classifier,
            guide=self.guide,
        )
        if self.ends is not None:
            engine.start = self._between(engine, self.ends)
        if self.super_res is None:
            return engine
        config = self.config
        if self.guide is not None or not self.super_res.metadata.get("label_dropout"):
            # the base model decides what the image shows
            config = replace(config, guidance_scale=1.0, guidance_interval=None)
        upper = self._upper_labels if self.super_res.model_config.class_cond else None
        return Engine(self.super_res, config, runtime, images, base=engine, upper_labels=upper)

    def _upper_labels(self, labels: Int64Array) -> Int64Array:
        """Convert class indices of the base to those of super_res; ValueError if it lacks a class."""
        assert self.super_res is not None
        names, count = self.super_res.class_names, self.super_res.model_config.num_classes
        remedy = "draw classes that it was trained on (--class)"
        ours = self.known.names if self.known is not None else ()
        return renumbered(labels, ours, names, count, "the base", remedy, npz=True)

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
        labels = labels_of(self.known, np.zeros(1, dtype=np.int64), self.classes)
        return engine.encode(image[None], labels)


def with_sampler(flags: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of SampleConfig, with DPM-Solver++ if they name no sampler, in 20 steps if they choose no timesteps.

    That is for the models of recipe auto and for flows; others are drawn as in improved-diffusion, by their ancestral
    steps.
    """
    given = {name for name, value in flags.items() if value is not None}
    process, recipe = checkpoint.diffusion_config, checkpoint.metadata.get("run_config", {}).get("recipe")
    if "sampler" in given or (recipe != Recipe.AUTO and process.prediction is not Prediction.FLOW):
        return dict(flags)
    few = process.diffusion_steps <= FAST_STEPS or process.timestep_respacing
    steps = {} if few or given & {"steps", "timestep_respacing"} else {"steps": FAST_STEPS}
    return {**flags, "sampler": Sampler.DPM, **steps}


def _refuse_guidance(checkpoint: Checkpoint, config: SampleConfig) -> None:
    asked = f"guidance_scale {config.guidance_scale:g}: this model was trained without"
    if config.guidance_scale != 1 and not checkpoint.model_config.class_cond:
        raise ValueError(f"{asked} classes (class_cond)")
    if config.guidance_scale != 1 and not checkpoint.metadata.get("label_dropout"):
        raise ValueError(f"{asked} label dropout, so it cannot predict without a class: train with --label-dropout 0.1")


def _refuse_classifier(checkpoint: Checkpoint, classifier: ClassifierCheckpoint) -> None:
    """ValueError, naming what differs, if the classifier does not know the images of the model."""
    model, config = checkpoint.model_config, classifier.config
    if model.small_size:
        raise ValueError("classifier: not with a super-resolution model; guide the model that draws the small images")
    if not classifier.metadata.get("noised", True):
        raise ValueError("classifier: it was trained on clean images (--no-noised) and cannot guide noisy ones")
    if model.image_size != config.image_size:
        raise ValueError(
            f"classifier: it knows images of {config.image_size} pixels, and the model draws {model.image_size}"
        )
    if model.class_cond:
        _refuse_classes("classifier", checkpoint, classifier.class_names, config.num_classes)
    if checkpoint.diffusion_config.prediction is Prediction.FLOW:
        raise ValueError("classifier: the model predicts a flow, whose noise schedule no classifier is trained on")
    if (process := classifier.diffusion_config) is not None:
        for name in _PROCESS:
            here, there = getattr(checkpoint.diffusion_config, name), getattr(process, name)
            if here != there and not (name == "rescale_timesteps" and process.diffusion_steps == 1000):
                flag = f"--{name.replace('_', '-')} {here}"
                if isinstance(here, bool):
                    flag = f"--{'' if here else 'no-'}{name.replace('_', '-')}"
                raise ValueError(
                    f"classifier: it was trained with {name} {there}, and the model with {here}: train it with the "
                    f"model's process ({flag})"
                )


def _refuse_guide(checkpoint: Checkpoint, guide: Checkpoint) -> None:
    """ValueError, naming what differs, if the guide's prediction is not one of the same thing as the model's."""
    model, config = checkpoint.model_config, guide.model_config
    if model.small_size or config.small_size:
        raise ValueError("guide: not with a super-resolution model; guide the model that draws the small images")
    if model.image_size != config.image_size:
        raise ValueError(f"guide: it draws images of {config.image_size} pixels, and the model {model.image_size}")
    if model.class_cond != config.class_cond:
        ours, theirs = ("with" if c.class_cond else "without" for c in (model, config))
        raise ValueError(f"guide: it was trained {theirs} classes (class_cond), and the model {ours}")
    if model.class_cond:
        _refuse_classes("guide", checkpoint, guide.class_names, config.num_classes)
    here, there = (build_diffusion(replace(c.diffusion_config, timestep_respacing="")) for c in (checkpoint, guide))
    if here.model_mean_type is not there.model_mean_type:
        ours, theirs = (process.model_mean_type.name.lower() for process in (here, there))
        raise ValueError(f"guide: it predicts {theirs}, and the model {ours}")
    times = torch.arange(here.num_timesteps)
    if not (
        np.array_equal(here.alphas_cumprod, there.alphas_cumprod)
        and torch.equal(here.model_timesteps(times), there.model_timesteps(times))
    ):
        found = [d for d in differences(checkpoint.diffusion_config, guide.diffusion_config) if d[0] in _PROCESS]
        ours, theirs = (", ".join(f"{d[0]} {d[side]}" for d in found) for side in (1, 2))
        raise ValueError(
            f"guide: its diffusion process ({theirs}) is not the model's ({ours}): train it with the model's"
        )


def _refuse_classes(what: str, checkpoint: Checkpoint, theirs: tuple[str, ...], count: int) -> None:
    ours = checkpoint.class_names
    if checkpoint.model_config.num_classes != count:
        raise ValueError(f"{what}: it has {count} classes, and the model {checkpoint.model_config.num_classes}")
    if ours and theirs and ours != theirs:
        i = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if len(set(pair)) > 1)
        here, there = (printable(names[i]) if i < len(names) else "absent" for names in (ours, theirs))
        raise ValueError(f"{what}: its class {i} is {there}, and the model's {here}: train it on the same data")


def _refuse_unlike(base: Checkpoint, upper: Checkpoint, classes: bool) -> None:
    small, large = base.model_config, upper.model_config
    if not large.small_size:
        raise ValueError("super_res: this is not a super-resolution model")
    if small.image_size != large.small_size:
        raise ValueError(
            f"super_res: the model enlarges images of {large.small_size} pixels, and the base draws {small.image_size}"
        )
    if large.class_cond and not classes:
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
