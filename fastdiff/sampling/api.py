"""Sampling in one call."""

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastdiff.checkpoint import (
    Checkpoint,
    ClassifierCheckpoint,
    find_checkpoint,
    load_checkpoint,
    load_classifier,
)
from fastdiff.config import RuntimeConfig, SampleConfig
from fastdiff.models.unet import Encoder
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.base_samples import unreadable_in
from fastdiff.sampling.loop import Int64Array
from fastdiff.sampling.output import Uint8Array
from fastdiff.sampling.plan import Plan, with_sampler

Source = str | os.PathLike[str] | Checkpoint
Class = str | int
Model = TypeVar("Model", bound=Encoder)


def sample(
    checkpoint: Source | None = None,
    num_samples: int | None = None,
    *,
    indices: Sequence[int] | None = None,
    classes: Class | Sequence[Class] = (),
    ema_rate: float | None = None,
    ema_length: float | None = None,
    base_samples: str | os.PathLike[str] | None = None,
    skip_unreadable: bool = False,
    super_res: Source | None = None,
    classifier: str | os.PathLike[str] | ClassifierCheckpoint | None = None,
    guide: Source | None = None,
    interpolate: tuple[str | int, str | int] | None = None,
    **settings: Any,
) -> Uint8Array:
    """Draw images from a checkpoint, a run folder or, by default, the newest run under runs/: uint8 (N, H, W, 3).

    From a run folder the newest checkpoint is taken, and ``ema_rate`` selects its EMA; 0 selects the raw weights, and
    ``ema_length`` the average of a length (see load_checkpoint). The images are numbered 0 to num_samples - 1 (by
    default 16, or the number of base samples); ``indices`` draws other numbers instead. An image depends only on the
    seed and its number. ``classes`` are class names or indices, drawn in turn. ``base_samples`` is an npz, folder or
    zip of images for a super-resolution model to enlarge; ``skip_unreadable`` leaves out files that cannot be read.
    ``super_res`` is a super-resolution checkpoint that enlarges the images of this one. ``classifier`` is a
    classifier's checkpoint or run that guides this one by ``classifier_scale``; an unconditional model then draws the
    classifier's classes. ``guide`` is a worse model of the same images, such as an earlier step, away from which
    ``guidance_scale`` moves them. ``interpolate`` is a pair of seeds or image files. ``settings`` are the fields of
    SampleConfig (sampler, steps, seed, guidance_scale, batch_size, ...) and of RuntimeConfig (device, precision,
    compile, ...). Without a sampler a model of recipe auto is drawn by DPM-Solver++, by default in 20
    steps, others by their ancestral steps.

    The model of a Checkpoint is not modified. ValueError, with a message of one line, if an argument is invalid.
    """
    known = [{f.name for f in fields(kind)} for kind in (SampleConfig, RuntimeConfig)]
    if unknown := sorted(set(settings) - known[0] - known[1]):
        raise ValueError(f"sample has no setting {', '.join(unknown)}")
    drawing = {name: value for name, value in settings.items() if name in known[0]}
    SampleConfig(**drawing)  # refuses a wrong value before the models are read
    runtime = Runtime.resolve(RuntimeConfig(**{name: value for name, value in settings.items() if name in known[1]}))
    if num_samples is not None and indices is not None:
        raise ValueError("num_samples and indices both say which images to draw: give one of them")
    if interpolate is not None and len(interpolate) != 2:
        raise ValueError(f"interpolate must be two seeds or image files, not {len(interpolate)}")
    if guide is not None and "guidance_scale" not in settings:
        raise ValueError("guide: say by how much it guides, such as guidance_scale=2")
    base = None if base_samples is None else Path(base_samples)
    loaded = _loaded(checkpoint, runtime, ema_rate, ema_length)
    plan = Plan.of(
        loaded,
        SampleConfig(**with_sampler(drawing, loaded)),
        super_res=None if super_res is None else _loaded(super_res, runtime),
        classifier=None if classifier is None else _loaded_classifier(classifier, runtime),
        guide=None if guide is None else _loaded(guide, runtime),
        base_samples=base,
        skipped=unreadable_in(base) if skip_unreadable else None,
        ends=None if interpolate is None else (str(interpolate[0]), str(interpolate[1])),
        classes=[classes] if isinstance(classes, (str, int, np.integer)) else list(classes),
        num_samples=num_samples,
    )
    numbers = _numbers(np.arange(plan.config.num_samples) if indices is None else np.asarray(indices))
    labels = plan.labels(numbers)
    if plan.base is not None and not skip_unreadable:
        plan.base.check(numbers)
    return np.concatenate(list(plan.engine(runtime, len(numbers)).draw(numbers, labels)))


def _numbers(indices: NDArray[Any]) -> Int64Array:
    if indices.ndim != 1 or not len(indices) or indices.dtype.kind not in "iu":
        raise ValueError("indices must be the numbers of images, such as [17, 42]")
    if indices.min() < 0 or indices.max() >= 2**63:
        raise ValueError("indices must be at least 0 and below 2^63")
    return indices.astype(np.int64)


def _loaded_classifier(source: str | os.PathLike[str] | ClassifierCheckpoint, runtime: Runtime) -> ClassifierCheckpoint:
    if isinstance(source, ClassifierCheckpoint):
        return replace(source, model=_copied(source.model, runtime))
    return load_classifier(source, device=runtime.device, kernels=runtime.kernels, memory_format=runtime.memory_format)


def _copied(model: Model, runtime: Runtime) -> Model:
    return deepcopy(model).to(runtime.device).lay_out(runtime.memory_format)


def _loaded(
    source: Source | None, runtime: Runtime, ema_rate: float | None = None, ema_length: float | None = None
) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return replace(source, model=_copied(source.model, runtime))
    path = find_checkpoint(None if source is None else Path(source), ema_rate=ema_rate, ema_length=ema_length)
    return load_checkpoint(path, device=runtime.device, kernels=runtime.kernels, memory_format=runtime.memory_format)
