"""Pixels and labels of a folder of images."""

from pathlib import Path

import numpy as np

from fastdiff import ImageFolder

from .support import GOLDEN, load

ROOT = GOLDEN / "images"
JPEG_LEVELS = 2
"""JPEG decoders may differ by this much."""


def test_pixels_and_labels() -> None:
    data = load("images.npz")
    assert set(data) == {"image_size", "paths", "pixels", "labels", "class_names"}
    folder = ImageFolder(ROOT, data["image_size"], labels="prefix")
    assert len(folder) == len(data["paths"])
    assert [(ROOT / path).relative_to(ROOT).as_posix() for path in folder.paths] == data["paths"].tolist()
    assert list(folder.class_names) == data["class_names"].tolist()
    for i, (path, golden, label) in enumerate(zip(data["paths"], data["pixels"], data["labels"], strict=True)):
        pixels, found_label = folder[i]
        assert pixels.dtype == np.uint8
        assert pixels.shape == (data["image_size"], data["image_size"], 3)
        assert found_label == label, path
        levels = np.abs(pixels.transpose(2, 0, 1).astype(int) - golden.astype(int)).max()
        assert levels <= (JPEG_LEVELS if Path(path).suffix.lower() in (".jpg", ".jpeg") else 0), path


def test_every_image_is_in_the_golden_list() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}
    assert files == set(load("images.npz")["paths"].tolist())
