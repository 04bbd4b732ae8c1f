"""From a folder of images to batches: find the images, decode them once, draw them in a stateless order."""

from fastdiff.data.batches import batch_indices, batches, epoch_order, prefetch_to_device
from fastdiff.data.dataset import ImageFolder, LeftOut, Preflight
from fastdiff.data.images import (
    MAX_PIXELS,
    Decoding,
    UnreadableImage,
    decode,
    load,
    normalised,
    resize_and_crop,
    to_uint8,
)
from fastdiff.data.kinds import EXTENSIONS
from fastdiff.data.loading import Dataset, load_dataset, load_shared
from fastdiff.data.npz import Samples, read_samples

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Dataset",
    "Decoding",
    "ImageFolder",
    "LeftOut",
    "Preflight",
    "Samples",
    "UnreadableImage",
    "batch_indices",
    "batches",
    "decode",
    "epoch_order",
    "load",
    "load_dataset",
    "load_shared",
    "normalised",
    "prefetch_to_device",
    "read_samples",
    "resize_and_crop",
    "to_uint8",
]
