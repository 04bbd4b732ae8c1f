"""Copy each batch to the device while the previous training step runs."""

from collections.abc import Generator
from contextlib import closing

import torch

from fastdiff.data.batches import Batch


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
