"""Random crops, and geometric augmentation of which the model is told, so that it does not leak into samples.

Augmentation is that of Karras et al. 2022 ("Elucidating the design space of diffusion-based generative models"),
appendix F.2, a part of the pipeline of Karras et al. 2020 ("Training generative adversarial networks with limited
data"). All of it is a function of seed and sample, computed on the device without a host sync.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels import philox_normal, philox_uint32

UNIFORM_STREAM, NORMAL_STREAM, CROP_STREAM = 0xFFFFFFF8, 0xFFFFFFF7, 0xFFFFFFF6
"""Philox steps of their own, beside training's others."""

_OCTAVES = 0.2
"""Standard deviation of the scaling and of the stretching, in octaves."""
_SHIFT = 1 / 8
"""Standard deviation of the translation, as a share of the side."""


def augmented(
    x: Tensor, size: int, seed: int, numbers: Tensor, *, crop: float, probability: float
) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) made of x (N, 3, H, H), both in [-1, 1], and what the model is told of them, (N, 9).

    ``numbers`` (N,) are those of the samples, ``crop`` is the smallest share of the side that a crop keeps, and
    ``probability`` that of each transform. Without a crop an image to which nothing is done stays as it is.
    """
    matrices, told = transforms(seed, numbers, probability)
    if crop == 1 and x.shape[2] == size:
        untouched = (told == 0).all(dim=1)[:, None, None, None]
        return torch.where(untouched, x, warped(x, matrices, size)), told
    share, centre = crops(seed, numbers, crop)
    matrices = share[:, None, None] * matrices + F.pad(centre[:, :, None], (2, 0))
    return warped(x, matrices, size), told


def whole(x: Tensor, size: int) -> Tensor:
    """The images x (N, 3, H, H) in [-1, 1] at the given size, neither cropped nor augmented."""
    return x if x.shape[2] == size else F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1, 1)


def transforms(seed: int, numbers: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """The transforms of the samples ``numbers`` (N,): matrices (N, 2, 3), and what the model is told of them, (N, 9).

    In this order, each with the given probability: a mirroring left to right and one upside down, which happen in half
    of these cases; scaling by 2^0.2a; rotation by any angle; stretching by 2^0.2b along any direction and by its
    inverse across it; and translation by c / 8 and d / 8 of the side, where a, b, c and d are standard normal.

    A matrix maps a place in the result to its source, both in [-1, 1]. The model is told the mirrorings, a, the cosine
    of the rotation - 1 and its sine, b times cosine and sine of twice the direction, c and d; 0 where nothing is done.
    Twice, unlike in the paper: a direction and its opposite are one, and so are b and -b across it.
    """
    words = philox_uint32(seed, numbers, UNIFORM_STREAM, 10)
    normals = philox_normal(seed, numbers, NORMAL_STREAM, (4,))
    done = (words[:, :6] < round(probability * 2**32)).float()
    mirror_x, mirror_y = ((words[:, 6:8] >> 31) * done[:, :2]).unbind(1)
    angle, twice = (words[:, 8:] * (2 * math.pi / 2**32) - math.pi).unbind(1)
    scale, stretch = (normals[:, 0] * done[:, 2], normals[:, 1] * done[:, 4])
    angle = angle * done[:, 3]
    shift = normals[:, 2:] * done[:, 5:]  # (N, 2)

    sine, cosine = angle.sin(), angle.cos()
    along, slant = twice.cos(), twice.sin()
    octaves = math.log(2) * _OCTAVES * stretch
    even, odd = octaves.cosh(), octaves.sinh()
    # each factor is the inverse of what is done to the image; the last one is done last
    mirror = _matrix(1 - 2 * mirror_x, 0 * scale, 0 * scale, 1 - 2 * mirror_y)
    turn = _matrix(cosine, sine, -sine, cosine)
    pull = _matrix(even - odd * along, -odd * slant, -odd * slant, even + odd * along)
    linear = _product(_product(mirror, turn), pull) * torch.exp2(-_OCTAVES * scale)[:, None, None]
    offset = _product(linear, (-2 * _SHIFT * shift)[:, :, None])
    told = [mirror_x, mirror_y, scale, cosine - 1, sine, stretch * along, stretch * slant, *shift.unbind(1)]
    return torch.cat([linear, offset], dim=2), torch.stack(told, dim=1)


def crops(seed: int, numbers: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Random square crops of the samples ``numbers`` (N,): their sides (N,) and centres (N, 2), of an image's [-1, 1].

    The side is uniform from the share ``smallest`` of the image's to all of it, and so is the place.
    """
    words = philox_uint32(seed, numbers, CROP_STREAM, 3) / 2**32
    share = smallest + (1 - smallest) * words[:, 0]
    return share, (1 - share)[:, None] * (2 * words[:, 1:] - 1)


def warped(x: Tensor, matrices: Tensor, size: int) -> Tensor:
    """Images (N, 3, size, size) with the pixels of x (N, 3, H, H) that ``matrices`` (N, 2, 3) say, in [-1, 1].

    Beyond its edges an image is mirrored. They are resampled at twice the size and then reduced by an antialiasing
    filter: this keeps details sharp, and makes no moire where an image becomes smaller.
    """
    fine = F.interpolate(x, scale_factor=2, mode="bicubic")
    line = (2 * torch.arange(2 * size, device=x.device) + 1) / (2 * size) - 1  # the centres of the pixels
    of_x, of_y, offset = matrices[:, None, None].unbind(-1)  # (N, 1, 1, 2)
    # affine_grid would multiply matrices, in TF32 if that is on
    grid = line[:, None] * of_x + line[:, None, None] * of_y + offset  # (N, 2 size, 2 size, 2)
    moved = F.grid_sample(fine, grid, padding_mode="reflection", align_corners=False)
    return F.interpolate(moved, size, mode="bicubic", antialias=True).clamp(-1, 1)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The matrices (N, 2, 2) with rows (a, b) and (c, d)."""
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix products of a (N, 2, 2) and b (N, 2, K), in fp32 on every device."""
    return (a[:, :, :, None] * b[:, None]).sum(dim=2)
