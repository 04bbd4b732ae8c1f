"""Sampling as one call."""

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from fastdiff.config import RuntimeConfig, SampleConfig
from fastdiff.runtime.device import Runtime
from fastdiff.sampling.generate import Uint8Array
from fastdiff.sampling.plan import Plan

Source = str | os.PathLike[str] | Checkpoint


def sample(
    checkpoint: Source,
    num_samples: int | None = None,
    *,
    indices: Sequence[int] | None = None,
    classes: str | int | Sequence[str | int] = (),
    base_samples: str | os.PathLike[str] | None = None,
    super_res: Source | None = None,
    interpolate: tuple[str | int, str | int] | None = None,
    **settings: Any,
) -> Uint8Array:
    """Draw images from a checkpoint, or a run folder's newest: uint8 (N, H, W, 3).

    They are the images 0 to num_samples - 1 (by default 16, or as many as there are base samples), or those of the
    numbers ``indices``: an image depends on seed and number alone. ``classes`` are names or numbers, drawn in turn;
    ``base_samples`` an npz or a folder, which a super-resolution model enlarges; ``super_res`` a checkpoint that
    enlarges what this one draws; ``interpolate`` two seeds or image files. ``settings`` are the fields of SampleConfig
    (sampler, steps, seed, guidance_scale, batch_size, ...) and of RuntimeConfig (device, precision, compile, ...).

    A Checkpoint's model is left as it is. ValueError in one line where something does not fit.
    """
    known = [{f.name for f in fields(kind)} for kind in (SampleConfig, RuntimeConfig)]
    if unknown := sorted(set(settings) - known[0] - known[1]):
        raise ValueError(f"sample has no setting {', '.join(unknown)}")
    config = SampleConfig(**{name: value for name, value in settings.items() if name in known[0]})
    runtime = Runtime.resolve(RuntimeConfig(**{name: value for name, value in settings.items() if name in known[1]}))
    if num_samples is not None and indices is not None:
        raise ValueError("num_samples and indices both say which images to draw: give one of them")
    model = _loaded(checkpoint, runtime)
    plan = Plan.of(
        model,
        config,
        super_res=None if super_res is None else _loaded(super_res, runtime),
        base_samples=None if base_samples is None else Path(base_samples),
        ends=None if interpolate is None else (str(interpolate[0]), str(interpolate[1])),
        classes=(classes,) if isinstance(classes, (str, int)) else classes,
        num_samples=num_samples,
    )
    numbers = np.arange(plan.config.num_samples) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(numbers) or numbers.min() < 0:
        raise ValueError("indices must be numbers of images, 0 and up")
    labels = plan.labels(numbers)
    return np.concatenate(list(plan.pipeline(runtime, len(numbers)).draw(numbers, labels)))


def _loaded(source: Source, runtime: Runtime) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return replace(source, model=deepcopy(source.model).to(runtime.device))
    path = find_checkpoint(Path(source))
    return load_checkpoint(path, device=runtime.device, kernels=runtime.kernels, memory_format=runtime.memory_format)
