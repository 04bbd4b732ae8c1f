"""Preview grids: samples from the model during training."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdiff.config import DiffusionConfig, SampleConfig, Sampler
from fastdiff.data import Dataset, normalised
from fastdiff.data.classes import completed
from fastdiff.diffusion import build_diffusion
from fastdiff.models import UNet
from fastdiff.models.super_res import low_resolution
from fastdiff.runtime.device import Runtime
from fastdiff.sampling import generate, save_grid
from fastdiff.sampling.output import Uint8Array, columns_by_class
from fastdiff.training.state import TrainState

Rows = NDArray[np.int64]

IMAGES = 16
STEPS = 25


def save_previews(folder: Path, state: TrainState, model: UNet, dataset: Dataset, runtime: Runtime) -> list[Path]:
    """Save grids of 16 images in 25 DDIM steps from raw and EMA weights, from fixed noise, with their class names.

    The classes take turns. A super-resolution model enlarges images of the dataset.

    Each process samples some of the images; rank 0 writes the files. Returns their paths. The model is not compiled
    here, because the shapes differ from training's. If a process raises ValueError or OSError, all processes do.
    """
    before = [p.detach().clone() for p in state.parameters]
    config = model.config
    rows, labels = _chosen(dataset, config.num_classes if config.class_cond else 0, config.small_size is not None)
    names = columns = None
    if labels is not None:
        called = completed(state.config.class_names, config.num_classes)
        names, columns = [called[label] for label in labels], columns_by_class(labels)
    paths = []
    model.eval()
    try:
        for name, ema in [("raw", None), *((f"ema_{ema.rate}", ema) for ema in state.emas)]:
            _set(model, state.parameters, before if ema is None else ema.tensors())
            images = _draw(state, model, dataset, rows, labels, runtime)
            path = folder / f"{state.step:06d}_{name}.png"
            state.world.from_main(partial(save_grid, path, images, columns, names))
            paths.append(path)
    finally:
        _set(model, state.parameters, before)
        model.train()
    return paths


def _chosen(dataset: Dataset, classes: int, enlarged: bool) -> tuple[Rows, Rows | None]:
    """The rows of the dataset whose images are ``enlarged``, and the labels of the previews, None without classes.

    An enlarged image has its own class; of each class the first image comes first, then the second of each.
    """
    numbers, there = np.arange(IMAGES), dataset.labels
    if not classes or there is None or not enlarged:
        return numbers % len(dataset.images), numbers % classes if classes else None
    order = np.argsort(there, kind="stable")
    by_class = there[order]
    turn = np.arange(len(order)) - np.searchsorted(by_class, by_class)  # the image's number within its class
    rows = order[np.lexsort((by_class, turn))[numbers % len(order)]]
    return rows, there[rows]


def _draw(
    state: TrainState, model: UNet, dataset: Dataset, rows: Rows, labels: Rows | None, runtime: Runtime
) -> Uint8Array:
    world, config, process = state.world, model.config, state.config.diffusion
    steps = min(STEPS, process.diffusion_steps)
    values = {**process.to_dict(), "timestep_respacing": str(steps)}
    # The same number on every process: FSDP requires equally many forward passes.
    ours = (np.arange(world.rank, world.rank + world.size * -(-IMAGES // world.size), world.size)) % IMAGES

    def low_res(numbers: NDArray[np.int64]) -> Tensor:
        assert config.small_size is not None
        images = torch.from_numpy(np.asarray(dataset.images[rows[numbers]]))
        return low_resolution(normalised(images), config.small_size)

    batches = generate(
        runtime.eager(model),
        build_diffusion(DiffusionConfig.from_dict(values), runtime.kernels),
        SampleConfig(num_samples=len(ours), batch_size=len(ours), sampler=Sampler.DDIM),
        image_size=config.image_size,
        device=runtime.device,
        indices=ours,
        labels=None if labels is None else labels[ours],
        low_res=low_res if config.small_size is not None else None,
    )
    drawn = world.on_all(lambda: np.concatenate(list(batches)))
    found: dict[int, Uint8Array] = {}
    for indices, images_of_one in world.all_gather_object((ours, drawn)):
        found |= zip(indices.tolist(), images_of_one, strict=True)
    return np.stack([found[index] for index in range(IMAGES)])


@torch.no_grad()
def _set(model: UNet, parameters: list[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_(parameters, values)
    if isinstance(model, FSDPModule):
        model.reshard()  # after a forward pass the outermost layers stay unsharded, with their old values
