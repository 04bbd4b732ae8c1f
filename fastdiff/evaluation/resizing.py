"""Images resized as other projects resize them: figures are comparable only if the resizing is the same."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_like_pillow(images: Tensor, size: int) -> Tensor:
    """Levels (N, C, H, W) uint8 -> (N, C, size, size) float32 of whole numbers, by Pillow's bicubic interpolation.

    As in Pillow, the kernel widens where images shrink, and the result is rounded to levels after each dimension, the
    width first. Pillow computes in whole numbers: one pixel in a hundred differs by a level, two at most.
    """
    levels = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        if levels.shape[2:] != shape:
            levels = F.interpolate(levels, shape, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return levels


def resized_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W), any floats -> (N, C, size, size), by TensorFlow 1's bilinear interpolation.

    Pixel i of the result lies at i * H / size, not at the place of its centre, and nothing is smoothed where images
    shrink (tf.image.resize_bilinear with align_corners=False, as the graph of the FID network has it).
    """
    for dim in (3, 2):
        length = images.shape[dim]
        at = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        below = at.long()
        above = (below + 1).clamp_(max=length - 1)
        share = (at - below).to(images.dtype).view(-1, *[1] * (3 - dim))
        start = images.index_select(dim, below)
        images = start + (images.index_select(dim, above) - start) * share
    return images
