"""The copy of a batch to the device, beside the training step before it."""

from collections.abc import Generator
from contextlib import closing

import torch

from fastdiff.data.batches import Batch


def on_device(batches: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on ``device``, in order; one that is there already is passed on as it is.

    On CUDA the next batch is copied on a stream of its own while the present one is trained on, and the consumer's
    stream, not the host, waits for the copy; that takes batches in pinned memory. Closing it closes ``batches``.
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
        # The pinned memory may be let go of at once: PyTorch's allocator gives it out again after the copy.
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
                # It was allocated for the copying stream, which would take the memory back while it is still read.
                tensor.record_stream(consumer)
        yield batch


def _to(batch: Batch, device: torch.device) -> Batch:
    images, labels = batch
    return images.to(device, non_blocking=True), None if labels is None else labels.to(device, non_blocking=True)
