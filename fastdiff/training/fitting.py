"""Finds by trial how many images fit into memory in one micro-batch."""

from collections.abc import Callable

import torch

from fastdiff.runtime.distributed import World
from fastdiff.runtime.memory import out_of_memory


def largest_that_fits(most: int, attempt: Callable[[int], None], world: World) -> int:
    """The first of ``most``, half of it, half of that, ... for which ``attempt`` has enough memory on every process.

    ValueError if not even a size of 1 fits.
    """
    size = most
    while not all(world.all_gather_object(_fits(attempt, size))):
        if size == 1:
            world.refuse(
                "out of memory with one image in a forward pass: use --use-checkpoint, a smaller model, or --parallel "
                "fsdp on several GPUs"
            )
        size = -(-size // 2)
    return size


def _fits(attempt: Callable[[int], None], size: int) -> bool:
    try:
        attempt(size)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits
