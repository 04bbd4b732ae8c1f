"""From one image file to pixels: decode the common formats, resize and crop as improved-diffusion does, normalise."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin
from PIL import WebPImagePlugin as WebpImagePlugin

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp")
"""File extensions that count as images, in upper or lower case."""

MAX_PIXELS = 2**26
"""Images that are larger by their header are refused before decoding: 8192 x 8192, a quarter GiB in Pillow."""

MAX_BYTES = 2**30
"""Larger files are refused without reading them: twice the size of MAX_PIXELS uncompressed pixels."""

MAX_ASPECT = 16
"""Above this ratio of long to short side, only the part of the image that survives the crop is resized."""

_READERS: dict[bytes, Callable[[BinaryIO], ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"RIFF": WebpImagePlugin.WebPImageFile,
}

# A large image takes up to a GiB with its copies: one per core could exhaust the memory of a big machine.
_LARGE_PIXELS = 2**24
_large_images = threading.BoundedSemaphore(2)


class File(Protocol):
    """A path, or an object that opens like one; str() gives its name."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO: ...


class UnreadableImage(ValueError):
    """A file that cannot be used as an image; ``reason`` says why in a few words."""

    def __init__(self, path: File, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def decode(path: str | File) -> Image.Image:
    """The first frame of an image file, upright (EXIF), in mode RGB, with transparency over white.

    Raises UnreadableImage unless the file is a complete PNG, JPEG, GIF, WebP or BMP of at most MAX_PIXELS pixels.
    """
    with _opened(path) as image:
        return _upright_rgb(image)


def load(path: str | File, size: int) -> NDArray[np.uint8]:
    """The image file as a square, uint8 (size, size, 3). Raises UnreadableImage like decode."""
    return load_with_size(path, size)[0]


def load_with_size(path: str | File, size: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Like load, and also the original (width, height) of the upright image."""
    with _opened(path) as image:
        rgb = _upright_rgb(image)
        return resize_and_crop(rgb, size), rgb.size


def resize_and_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The centre square of an RGB image: uint8 (size, size, 3).

    Equals improved-diffusion's image_datasets.py pixel for pixel: halve with a box filter while the image is at least
    twice as large as needed, then resize the shorter side to ``size`` bicubically, then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return fit(image, size, Image.Resampling.BICUBIC)


def fit(image: Image.Image, size: int, resample: Image.Resampling) -> NDArray[np.uint8]:
    """The centre square of an RGB image after a single resize of its shorter side: uint8 (size, size, 3)."""
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(image.size) > MAX_ASPECT * min(image.size):
        # 30000 x 2 would become 960000 x 64, only to be cropped to 64 x 64. The result differs only in the order in
        # which Pillow resizes the two axes.
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
        return np.array(image.resize((size, size), resample, box=box))
    image = image.resize((width, height), resample)
    return np.array(image.crop((left, top, left + size, top + size)))


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, 3) as fp32 (N, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] as contiguous uint8 (N, H, W, 3), rounded towards zero as in improved-diffusion."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@contextlib.contextmanager
def _opened(path: str | File) -> Iterator[Image.Image]:
    """The image with only its header read; any error until the end of the block becomes UnreadableImage."""
    path = Path(path) if isinstance(path, str) else path
    try:
        with path.open("rb") as file:
            image = _open_header(path, file)
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise UnreadableImage(path, f"{image.width}x{image.height} is over the limit of {MAX_PIXELS:,} pixels")
            with _large_images if pixels > _LARGE_PIXELS else contextlib.nullcontext():
                yield image
    except (UnreadableImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(path, f"over the limit of {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise UnreadableImage(path, _reason(error)) from None


def _open_header(path: File, file: BinaryIO) -> ImageFile.ImageFile:
    # Do not use Image.open: it warns of large images through the process's warning filters, which threads cannot change
    # safely, it reads other formats, and it does not take a phone's JPEG with a depth map (MPO) for a JPEG.
    length = file.seek(0, 2)
    file.seek(0)
    if not length:
        raise UnreadableImage(path, "empty file")
    if length > MAX_BYTES:
        raise UnreadableImage(path, f"over the limit of {MAX_BYTES:,} bytes")
    start = file.read(16)
    file.seek(0)
    for magic, reader in _READERS.items():
        if start.startswith(magic):
            return reader(file)
    raise UnreadableImage(path, "not a PNG, JPEG, GIF, WebP or BMP inside")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error).lower()
    return "truncated" if "truncated" in text or "end of" in text else "damaged"


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block must not lose the image
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Keep the high byte, as Pillow does for 16-bit colour; its convert() would clip nearly everything to white."""
    values = np.asarray(image)  # (H, W)
    grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")
