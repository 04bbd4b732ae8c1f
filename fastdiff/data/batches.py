"""Batches of decoded images: a gather from the cache, one batch ahead of the training step."""

import itertools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from fastdiff.config import DataConfig
from fastdiff.data.cache import Dataset
from fastdiff.data.order import batch_indices

Batch = tuple[torch.Tensor, torch.Tensor | None]


def batches(
    dataset: Dataset,
    config: DataConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    *,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """The batches of updates start_step, start_step + 1, ... (0-based) without end.

    Each is uint8 (B, H, W, 3) images, mirrored at random if config.flip, and int64 (B,) labels or None, on the CPU.
    ``rows`` is the part of the batch that this process trains on: however many processes share a batch, together they
    see the same images. Warns if a batch is larger than the data. Closing the iterator ends its thread.
    """
    if batch_size > (n := len(dataset.images)):
        warnings.warn(
            f"batch_size {batch_size} is larger than the {n:,} images, which are drawn repeatedly", stacklevel=2
        )

    def gather(step: int) -> Batch:
        indices, flips = (part[rows] for part in batch_indices(n, batch_size, seed, step))
        images = np.asarray(dataset.images[indices])  # (B, H, W, 3), a copy
        if config.flip:
            images[flips] = images[flips, :, ::-1]
        labels = None if dataset.labels is None else torch.from_numpy(dataset.labels[indices])
        return torch.from_numpy(images), labels

    def prefetched() -> Iterator[Batch]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead = pool.submit(gather, start_step)
            for step in itertools.count(start_step + 1):
                ready, ahead = ahead, pool.submit(gather, step)
                yield ready.result()

    return prefetched()
