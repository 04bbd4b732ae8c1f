"""Images that a model is not trained on, and its losses on them, or a classifier's accuracy."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdiff.config import ClassifierTrainConfig, RunConfig, TrainConfig
from fastdiff.data import Dataset, load_shared
from fastdiff.data.classes import composed, renumbered
from fastdiff.kernels import philox_normal, philox_uint32
from fastdiff.models.unet import Encoder
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.training.metrics import LossSums
from fastdiff.training.objective import HELD_OUT_NOISE_STREAM, HELD_OUT_TIMESTEP_STREAM, Objective

MOST = 10_000
"""Held-out images that are measured, evenly chosen among more: an accuracy is then known to 0.5%.

Nor are more measured than are trained on between two measurements, so that these take at most a quarter of the time: a
forward pass is a third of what an image costs in training."""

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images to measure a model on every ``interval`` updates.

    They are the ``rows`` of ``dataset``, (N,), with ``labels`` (N,) in the model's numbering, in the order of the
    labels; None if the model has no classes.
    """

    dataset: Dataset
    rows: Rows
    labels: Rows | None
    interval: int


def hold_out(
    config: RunConfig, dataset: Dataset, world: World, display: Lines
) -> tuple[Rows | None, HeldOut | None, list[str]]:
    """The rows of the dataset to train on (None for all), the images that are held out, and lines for the log.

    These are the images of val_data_dir or else a share of the dataset's own, which depends on their names alone.
    ValueError if no image is left to train on, or if val_data_dir has a class that the dataset lacks. Collective.
    """
    train = config.train
    unmeasured = f"no image is held out, so that no {'accuracy' if config.classifies else 'held-out loss'} is measured"
    if train.val_data_dir:
        val, data = Path(train.val_data_dir).resolve(), Path(config.data.data_dir).resolve()
        if val.is_relative_to(data):
            world.refuse(f"val_data_dir {train.val_data_dir} is inside the data folder: its images would be trained on")
        if data.is_relative_to(val):
            world.refuse(
                f"val_data_dir {train.val_data_dir} contains the data folder: images that are trained on would be "
                "measured, too"
            )
        images = replace(config.data, data_dir=train.val_data_dir)
        with warnings.catch_warnings(action="ignore"):  # they are about training on these images
            other = load_shared(
                images,
                config.decoded_size,
                labelled=config.labelled,
                world=world,
                display=display,
                reading=config.reading,
            )
        labels = world.on_all(lambda: _labels(other, dataset, train.val_data_dir))
        lines = [f"held out: {other.preflight.line()}"]
        return None, _measured(other, np.arange(len(other.images)), labels, train), lines
    if not train.holdout:
        return None, None, [f"{unmeasured}: --val-data-dir gives one"] if config.classifies else []
    chosen = is_held_out(dataset.names, train.holdout)
    if chosen.all():
        world.refuse(
            f"holdout {train.holdout:g} leaves no image of {config.data.data_dir} to train on: use a smaller one"
        )
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return None, None, [f"{unmeasured}: give --val-data-dir, or a larger --holdout"]
    held_out = _measured(dataset, rows, None if dataset.labels is None else dataset.labels[rows], train)
    return np.flatnonzero(~chosen), held_out, [f"held out: {len(rows):,} of these images, not trained on"]


def is_held_out(names: Sequence[str], share: float) -> NDArray[np.bool_]:
    """Which of the images are held out, bool (N,): by a hash of their names, so the same on every machine."""

    def fraction(name: str) -> float:
        digest = hashlib.sha256(composed(name).encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:4], "big") / 2**32

    return np.array([fraction(name) < share for name in names], bool)


def _labels(other: Dataset, dataset: Dataset, place: str) -> Rows | None:
    """The other images' labels in the dataset's numbering, if it has any."""
    if other.labels is None:
        return None
    return renumbered(
        other.labels,
        other.class_names if other.named else None,
        dataset.class_names if dataset.named else (),
        len(dataset.class_names),
        place,
        "move its images away, or train on some",
    )


def doubts(train: TrainConfig, metadata: Mapping[str, Any], path: Path) -> list[str]:
    """A line for the log if images that are held out now were trained on by the run of the weights at ``path``.

    ``metadata`` is the file's; one without a run says nothing.
    """
    theirs = metadata.get("run_config", {}).get("train", {})
    if train.val_data_dir or not theirs:
        return []
    before = 0.0 if theirs.get("val_data_dir") else theirs.get("holdout", 0.0)
    if train.holdout <= before:
        return []
    what = "accuracy" if isinstance(train, ClassifierTrainConfig) else "held-out loss"
    return [
        f"warning: {path} held out {before:g} of its images, and this run {train.holdout:g} of its own: if they share "
        f"images, the {what} counts some that the weights were trained on; --holdout {before:g} counts none"
    ]


def _measured(dataset: Dataset, rows: Rows, labels: Rows | None, train: TrainConfig) -> HeldOut:
    order = np.arange(len(rows)) if labels is None else np.argsort(labels, kind="stable")
    most = min(MOST, train.eval_interval * train.batch_size or MOST)
    chosen = order[np.arange(most) * len(rows) // most] if len(rows) > most else order
    return HeldOut(dataset, rows[chosen], None if labels is None else labels[chosen], train.eval_interval)


def measure(
    held_out: HeldOut,
    objective: Objective,
    model: Encoder,
    runtime: Runtime,
    world: World,
    seed: int,
    batch_size: int,
) -> dict[str, float]:
    """The mean terms over the held-out images, as ``val_loss``, and by quarter of the timesteps, ``val_loss_q0``.

    Each image has one timestep and one noise, functions of the seed and its place among them. Neighbours, which have
    one class, take turns with the quarters, so that each quarter has every class of four images or more. Labels are the
    true ones, and there is no dropout. Each process measures up to ``batch_size`` images at a time. The model is not
    compiled here, because training's graph has gradients. Collective.
    """
    forward, sums = runtime.eager(model), LossSums(runtime.device, objective.terms)
    count, steps = len(held_out.rows), objective.num_timesteps
    size = min(batch_size, -(-count // world.size))

    def batch(first: int) -> None:
        # The same number of images on every process: FSDP requires equally many forward passes.
        places = np.arange(first, first + size)
        numbers = torch.from_numpy(places).to(runtime.device)
        places = places.clip(max=count - 1)
        held_out.dataset.check()
        images = torch.from_numpy(np.take(held_out.dataset.images, held_out.rows[places], axis=0)).to(runtime.device)
        y = None if held_out.labels is None else torch.from_numpy(held_out.labels[places]).to(runtime.device)
        x_start, conditions = objective.inputs(images, y, None)
        t = _timesteps(numbers, seed, steps)
        noise = philox_normal(seed, numbers, HELD_OUT_NOISE_STREAM, x_start.shape[1:])
        terms = objective.losses(forward, x_start, t, conditions, noise)
        sums.add({name: term.masked_fill(numbers >= count, torch.nan) for name, term in terms.items()}, t, steps)

    def batches() -> None:
        for first in range(0, count, world.size * size):
            batch(first + world.rank * size)

    model.eval()
    try:
        with torch.no_grad():
            world.on_all(batches)
    finally:
        model.train()
    if isinstance(model, FSDPModule):
        model.reshard()  # after a forward pass the outermost layers stay unsharded, with their old values
    found = sums.read(world.all_reduce)
    return {f"val_{name}": value for name, value in found.items() if name.partition("_q")[0] in objective.terms}


def _timesteps(numbers: Tensor, seed: int, steps: int) -> Tensor:
    """A timestep in the quarter (number mod 4) for each of ``numbers`` (N,), int64 (N,)."""
    words = philox_uint32(seed, numbers, HELD_OUT_TIMESTEP_STREAM, 1)[:, 0]
    return ((numbers % 4 * 2**32 + words) * steps) >> 34


def summary(found: dict[str, float], images: int, training: float) -> str:
    """The measured terms as a line for the log, beside a diffusion model's mean loss in ``training``."""
    if "val_acc1" not in found:
        count = f"{images:,} image{'s' * (images != 1)}"
        return f"held-out loss {found['val_loss']:.4f} (training {training:.4f}) on {count}"
    quarters = [f"{found[name]:.1%}" for q in range(4) if (name := f"val_acc1_q{q}") in found]
    by_quarter = f" ({', '.join(quarters)} by quarter of the timesteps)" if len(quarters) > 1 else ""
    return (
        f"accuracy {found['val_acc1']:.1%} on {images:,} held-out images{by_quarter}, "
        f"{found['val_acc5']:.1%} among the first 5, loss {found['val_loss']:.4f}"
    )
