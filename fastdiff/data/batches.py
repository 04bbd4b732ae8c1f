"""Batches of decoded images: drawn in an order without state, gathered ahead of the update, copied to the device.

The images of an update are a pure function of seed and update number, so that a resumed run skips nothing.
"""

import itertools
import warnings
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.config import DataConfig
from fastdiff.data.loading import Dataset
from fastdiff.runtime.threads import one_thread

AHEAD = 2
"""Number of prefetched batches: one more than needed, so that an occasional slow read costs nothing."""

Batch = tuple[torch.Tensor, torch.Tensor | None]


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of n images in one epoch (0-based): a read-only int64 (n,) permutation."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


@lru_cache(maxsize=2)
def _epoch_flips(n: int, seed: int, epoch: int) -> NDArray[np.bool_]:
    # The third number makes the stream differ from the order's; it must not be 0, because seeds are padded with 0.
    return np.random.default_rng([seed, epoch, 1]).random(n) < 0.5


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Indices of the images (out of n) in update ``step`` (0-based), and which to mirror: int64 (B,), bool (B,).

    Updates take consecutive positions in an endless sequence of epochs, each of which contains every image once. A
    batch larger than n continues into the next epochs, so that over a run all images are drawn equally often, to
    within one.
    """
    assert min(n, batch_size, step + 1) > 0, (n, batch_size, step)
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    indices = np.empty(batch_size, np.int64)
    flips = np.empty(batch_size, np.bool_)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        indices[here] = epoch_order(n, seed, epoch)[places[here]]
        flips[here] = _epoch_flips(n, seed, epoch)[places[here]]
    return indices, flips


def batches(
    dataset: Dataset,
    config: DataConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    *,
    among: NDArray[np.int64] | None = None,
    rows: slice = slice(None),
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """The endless stream of batches for the updates start_step, start_step + 1, ... (0-based).

    Each batch is uint8 (B, H, W, 3) images, mirrored at random if config.flip, and int64 (B,) labels or None, on the
    CPU. ``among`` are the images to draw from, by default all. ``pin`` gathers them into pinned memory and needs CUDA.
    ``rows`` is the part of the batch that this process
    trains on: however many processes share a batch, together they see the same images. Warns if a batch is larger than
    the data. Closing the iterator ends its thread.

    Like Dataset.check, raises OSError before a batch. If the file shrinks or its disk fails during the gather itself,
    the process dies of SIGBUS, which Python cannot catch.
    """
    if batch_size > (n := len(dataset.images if among is None else among)):
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
        indices = (drawn if among is None else among[drawn])[rows]
        images = take(dataset.images, indices, torch.uint8)  # (B, H, W, 3)
        if config.flip:
            pixels = images.numpy()
            mirrored = flips[rows]
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return images, None if dataset.labels is None else take(dataset.labels, indices, torch.int64)

    def prefetched() -> Generator[Batch, None, None]:
        # pinned memory belongs to a device, and a new thread starts on the first one
        device = torch.cuda.current_device() if pin else None

        def begin() -> None:
            one_thread()
            if device is not None:
                torch.cuda.set_device(device)

        with ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=begin) as pool:
            ahead = deque(pool.submit(gather, start_step + i) for i in range(AHEAD))
            for step in itertools.count(start_step + AHEAD):
                ready = ahead.popleft().result()
                ahead.append(pool.submit(gather, step))
                yield ready

    return prefetched()


def prefetch_to_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on ``device``, in order; a batch that is already there passes through unchanged.

    On CUDA a separate stream copies the next batch while the current one is trained on. The consumer's stream, not the
    host, waits for the copy, which needs batches in pinned memory. Closing the iterator closes ``batches``.
    """
    with closing(batches):
        if device.type == "cuda":
            yield from _copied_ahead(batches, device)
        else:
            for batch in batches:
                yield _to(batch, device)


def _copied_ahead(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        # The pinned memory may be released at once: PyTorch's allocator reuses it only after the copy.
        with torch.cuda.stream(stream):
            return _to(batch, device), stream.record_event()

    copies = map(copy, batches)
    following = next(copies, None)
    while (present := following) is not None:
        following = next(copies, None)
        batch, copied = present
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(copied)
        for tensor in batch:
            if tensor is not None:
                # It was allocated on the copy stream, which would otherwise reuse the memory while it is still read.
                tensor.record_stream(consumer)
        yield batch


def _to(batch: Batch, device: torch.device) -> Batch:
    images, labels = batch
    return images.to(device, non_blocking=True), None if labels is None else labels.to(device, non_blocking=True)
