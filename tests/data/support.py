"""Images made on the spot."""

from pathlib import Path

import numpy as np
from PIL import Image

BROKEN_EXIF = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image in which no two pixels are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    """Write an image (small noise by default), making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(12, 8)).save(path, **options)
    return path
