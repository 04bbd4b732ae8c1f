"""From a folder of images to batches: find the images, decode them once, draw them in a stateless order."""

from fastdiff.data.batches import batches
from fastdiff.data.dataset import ImageFolder, LeftOut, Preflight
from fastdiff.data.images import EXTENSIONS, MAX_PIXELS, UnreadableImage, decode, load, resize_and_crop
from fastdiff.data.loading import Dataset, load_dataset, load_shared
from fastdiff.data.npz import Samples, read_samples
from fastdiff.data.order import batch_indices, epoch_order
from fastdiff.data.pixels import normalised, to_uint8
from fastdiff.data.prefetch import prefetch_to_device

__all__ = [
    "EXTENSIONS",
    "MAX_PIXELS",
    "Dataset",
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
