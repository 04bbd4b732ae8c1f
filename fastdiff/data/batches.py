"""Batches of decoded images, gathered from the cache ahead of the training step."""

import itertools
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.config import DataConfig
from fastdiff.data.loading import Dataset
from fastdiff.data.order import batch_indices

AHEAD = 2
"""Number of prefetched batches: one more than needed, so that an occasional slow read costs nothing."""

Batch = tuple[torch.Tensor, torch.Tensor | None]


def batches(
    dataset: Dataset,
    config: DataConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    *,
    rows: slice = slice(None),
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """The endless stream of batches for the updates start_step, start_step + 1, ... (0-based).

    Each batch is uint8 (B, H, W, 3) images, mirrored at random if config.flip, and int64 (B,) labels or None, on the
    CPU. ``pin`` gathers them into pinned memory and needs CUDA. ``rows`` is the part of the batch that this process
    trains on: however many processes share a batch, together they see the same images. Warns if a batch is larger than
    the data. Closing the iterator ends its thread.

    Like Dataset.check, raises OSError before a batch. If the file shrinks or its disk fails during the gather itself,
    the process dies of SIGBUS, which Python cannot catch.
    """
    if batch_size > (n := len(dataset.images)):
        warnings.warn(
            f"batch_size {batch_size} is larger than the {n:,} images, which are drawn repeatedly", stacklevel=2
        )

    def take(source: NDArray[Any], indices: NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
        taken = torch.empty((len(indices), *source.shape[1:]), dtype=dtype, pin_memory=pin)
        np.take(source, indices, axis=0, out=taken.numpy(), mode="clip")  # mode raise would go through a copy
        return taken

    def gather(step: int) -> Batch:
        dataset.check()
        drawn, flips = batch_indices(n, batch_size, seed, step)
        indices = drawn[rows]
        images = take(dataset.images, indices, torch.uint8)  # (B, H, W, 3)
        if config.flip:
            pixels = images.numpy()
            mirrored = flips[rows]
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return images, None if dataset.labels is None else take(dataset.labels, indices, torch.int64)

    def prefetched() -> Generator[Batch, None, None]:
        # pinned memory belongs to a device, and a new thread starts on the first one
        here = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin else None
        with ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=here) as pool:
            ahead = deque(pool.submit(gather, start_step + i) for i in range(AHEAD))
            for step in itertools.count(start_step + AHEAD):
                ready = ahead.popleft().result()
                ahead.append(pool.submit(gather, step))
                yield ready

    return prefetched()
