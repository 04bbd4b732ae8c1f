"""From one image file to pixels: decode the common formats, resize and crop as improved-diffusion does, normalise."""

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    _imaging,
    features,
)
from PIL import WebPImagePlugin as WebpImagePlugin

from fastdiff.config import READING, ImagesConfig
from fastdiff.data.kinds import FIRST_READ, START, kind_of, unread_content
from fastdiff.data.mending import mended

MAX_PIXELS = ImagesConfig.max_pixels
"""Images that are larger by their header are refused before decoding: 8192 x 8192, a quarter GiB in Pillow."""

MAX_BYTES = 2**30
"""Larger files are refused without reading them: twice the size of MAX_PIXELS uncompressed pixels."""

MAX_ASPECT = 16
"""Above this ratio of long to short side, only the part of the image that survives the crop is resized."""

DARK = 4095
"""16-bit images without a greater value are nearly black; most hold the 12 bits of a scanner or a camera."""


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing errors to stderr: they become exceptions, too. No effect where Pillow hides it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _tiff(file: BinaryIO) -> ImageFile.ImageFile:
    _silence_libtiff()
    return TiffImagePlugin.TiffImageFile(file)


_READERS: dict[str, Callable[[BinaryIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WebP": WebpImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": _tiff,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs about odd TIFFs, by default to stderr

T = TypeVar("T")

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF's tag, which Pillow does not apply to 16 bits

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


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels; the fields are those of ImagesConfig and RunConfig.

    ``window`` are the values of 16-bit grey images that become black and white. With ``reading`` 1 only PNG, JPEG, GIF,
    WebP and BMP files are read, and only if their metadata is sound and they end as they should.
    """

    max_pixels: int = MAX_PIXELS
    window: tuple[float, float] | None = None
    reading: int = READING

    @property
    def max_bytes(self) -> int:
        """The length of the largest file that is read."""
        return int(MAX_BYTES * max(1, self.max_pixels / MAX_PIXELS))


@dataclass(frozen=True)
class Loaded:
    """A square uint8 (size, size, 3) of an image, and the image's (width, height).

    ``peak`` is the greatest value of a 16-bit image, None for other images.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    peak: int | None


DEFAULT = Decoding()


def decode(path: str | File, decoding: Decoding = DEFAULT) -> Image.Image:
    """The first frame of an image file, upright (EXIF), in mode RGB, with transparency over white.

    Raises UnreadableImage unless the file is a complete PNG, JPEG, GIF, WebP, BMP, TIFF or AVIF of at most
    ``decoding.max_pixels`` pixels. A PNG's metadata and a JPEG's end marker need not be there or sound.
    """
    return _read(path, decoding, lambda image, _: image)


def load(path: str | File, size: int, decoding: Decoding = DEFAULT) -> NDArray[np.uint8]:
    """The image file as a square, uint8 (size, size, 3). Raises UnreadableImage like decode."""
    return load_described(path, size, decoding).pixels


def load_described(path: str | File, size: int, decoding: Decoding = DEFAULT) -> Loaded:
    """Like load, with what else there is to know of the image."""
    return _read(path, decoding, lambda image, peak: Loaded(resize_and_crop(image, size), image.size, peak))


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


_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def _read(path: str | File, decoding: Decoding, use: Callable[[Image.Image, int | None], T]) -> T:
    """``use`` of the upright image and its peak; any error, those of ``use`` included, becomes UnreadableImage."""
    path = Path(path) if isinstance(path, str) else path
    if Image.MAX_IMAGE_PIXELS is not None and decoding.max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = decoding.max_pixels  # Pillow's own limit, for TIFF, GIF and WebP
    kind = ""
    peak: int | None = None
    held = False

    def upright(file: BinaryIO) -> Image.Image:
        nonlocal peak, held
        image = _READERS[kind](file)
        pixels = image.width * image.height
        if pixels > decoding.max_pixels:
            raise UnreadableImage(path, f"{image.width}x{image.height} is {_too_many(decoding)}")
        if pixels > _LARGE_PIXELS and not held:
            large.enter_context(_large_images)
            held = True
        rgb, peak = _upright_rgb(image, decoding.window)
        return rgb

    try:
        with path.open("rb") as file, contextlib.ExitStack() as large:
            kind = _kind(path, file, decoding)
            try:
                return use(upright(file), peak)
            except (UnreadableImage, MemoryError, *_BOMBS):
                raise
            except Exception:
                if decoding.reading == 1 or (image := mended(kind, file, upright)) is None:
                    raise
                return use(image, peak)
    except (UnreadableImage, MemoryError):
        raise
    except _BOMBS:
        raise UnreadableImage(path, _too_many(decoding)) from None
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        raise UnreadableImage(path, _reason(error, kind)) from None


def _too_many(decoding: Decoding) -> str:
    return f"over the limit of {decoding.max_pixels:,} pixels: raise it with --max-pixels"


def _kind(path: File, file: BinaryIO, decoding: Decoding) -> str:
    # Do not use Image.open: it warns of large images through the process's warning filters, which threads cannot change
    # safely, it reads other formats, and it does not take a phone's JPEG with a depth map (MPO) for a JPEG.
    length = file.seek(0, 2)
    file.seek(0)
    if not length:
        raise UnreadableImage(path, "empty file")
    if length > decoding.max_bytes:
        raise UnreadableImage(path, f"over the limit of {decoding.max_bytes:,} bytes (16 for each of --max-pixels)")
    start = file.read(START)
    file.seek(0)
    kind = kind_of(start)
    known = FIRST_READ if decoding.reading == 1 else _READERS
    if kind is None or kind not in known or (kind == "AVIF" and not features.check("avif")):
        raise UnreadableImage(path, unread_content(start))
    return kind


def _reason(error: Exception, kind: str) -> str:
    if isinstance(error, _UnclearError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error).lower()
    if "truncated" in text or "end of" in text:
        return "truncated"
    return "damaged, or a TIFF that is not read: convert it to PNG" if kind == "TIFF" else "damaged"


class _UnclearError(ValueError):
    """An image's values have no plain meaning; the text says so, with the remedy."""


def _upright_rgb(image: Image.Image, window: tuple[float, float] | None) -> tuple[Image.Image, int | None]:
    """The image in RGB, and its greatest value if it has 16 bits."""
    deep = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block must not lose the image
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        return _from_grey(image, window)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
    image = image.convert("RGB")
    # Pillow keeps the high byte of 16-bit colour.
    return image, (int(np.asarray(image).max()) << 8) | 255 if deep else None


def _from_grey(image: Image.Image, window: tuple[float, float] | None) -> tuple[Image.Image, int | None]:
    """Grey of 16 or 32 bits. Without a window the high byte is kept, as Pillow does for 16-bit colour.

    Pillow's convert() would clip nearly everything to white.
    """
    values = np.asarray(image)  # (H, W)
    is_float = image.mode == "F"
    if is_float and window is None:
        if not (values.min() >= 0 and values.max() <= 1):  # nor with NaN
            raise _UnclearError("float values other than 0 to 1: name black and white with --window LOW,HIGH")
        window = (0, 1)
    if window is None:
        grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
    else:
        low, high = window
        scaled = (np.nan_to_num(values.astype(np.float32), nan=low) - low) * (255 / (high - low))
        grey = np.clip(scaled.round(), 0, 255).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB"), None if is_float else int(values.max())
