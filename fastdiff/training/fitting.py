"""Trial passes before the first update: they find how many images fit into memory, and warm the model up."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastdiff.config import RunConfig
from fastdiff.models.unet import Encoder
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.distributed import World
from fastdiff.runtime.memory import out_of_memory
from fastdiff.training.objective import Objective
from fastdiff.training.parallel import accumulating
from fastdiff.training.update import micro_batches

_REHEARSALS = 3
"""Batches that are timed."""


def choose_microbatch(config: RunConfig, model: Encoder, objective: Objective, runtime: Runtime, world: World) -> int:
    """The size for ``microbatch auto``, found while memory is reserved for Adam moments, EMAs and gradient buffers."""
    device, train = runtime.device, config.train
    numbers = sum(p.numel() for p in model.to(device).parameters())

    def attempt(images: int) -> None:
        averages = len(train.ema_rate) + len(train.ema_lengths)
        moments_averages_messages = torch.empty(numbers * (3 + averages), device=device)
        _pass(config, objective, runtime.eager(model), images, device)
        del moments_averages_messages

    found = largest_that_fits(train.batch_size // world.size, attempt, world)
    model.zero_grad(set_to_none=True)
    return found


def largest_that_fits(most: int, attempt: Callable[[int], None], world: World) -> int:
    """The first of ``most``, half of it, half of that, ... for which ``attempt`` has enough memory on every process.

    ValueError if not even a size of 1 fits.
    """
    size = most
    while True:
        try:
            attempt(size)
            fits = True
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if all(world.all_gather_object(fits)):
            return size
        if size == 1:
            world.refuse(
                "out of memory with one image in a forward pass: use --use-checkpoint, a smaller model, or --parallel "
                "fsdp on several GPUs"
            )
        size = -(-size // 2)


def seconds_per_update(
    config: RunConfig, objective: Objective, module: nn.Module, forward: Callable[..., Tensor], world: World
) -> float:
    """How long the passes of an update take on the slowest process, without data and optimizer. Collective."""
    device = next(module.parameters()).device

    def passes() -> None:
        warm_up(config, objective, module, forward, world)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    passes()
    began = time.perf_counter()
    for _ in range(_REHEARSALS):
        passes()
    return max(world.all_gather_object((time.perf_counter() - began) / _REHEARSALS))


def warm_up(
    config: RunConfig, objective: Objective, module: nn.Module, forward: Callable[..., Tensor], world: World
) -> None:
    """Run the forward and backward passes of one update, without the update; compiles the model if enabled.

    DDP builds its gradient buckets after the first backward pass, and they determine the order of its sums. A resumed
    run must build them as the original run did, or its sums differ in their last bits.
    """
    device = next(module.parameters()).device
    parts = micro_batches(config.train, world.size)
    for part in parts:
        with accumulating(module) if part is not parts[-1] else nullcontext():
            _pass(config, objective, forward, part.stop - part.start, device)
    module.zero_grad(set_to_none=True)


def _pass(
    config: RunConfig, objective: Objective, forward: Callable[..., Tensor], images: int, device: torch.device
) -> None:
    """Run a forward and a backward pass of ``images`` images."""
    size = config.decoded_size
    black = torch.zeros(images, size, size, 3, dtype=torch.uint8, device=device)
    none = torch.zeros(images, dtype=torch.int64, device=device)
    x_start, conditions = objective.inputs(black, none if config.labelled else None, none)
    noise = torch.zeros(x_start.shape, device=device)  # same layout as in an update, to avoid a recompile
    objective.losses(forward, x_start, none, conditions, noise)["loss"].sum().backward()
