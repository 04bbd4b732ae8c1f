"""The data sets: the same files every time, parts apart, and a remedy where a package is missing."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastdiff.benchmarks.quality.pictures import (
    PARTS,
    SOURCES,
    crops_of,
    read_pictures,
    write_pictures,
)
from fastdiff.config import PictureSet

from ...support import refusal
from .support import COLOURED, COLOURS, COUNTS


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def test_folders_are_written_once_and_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_pictures(COLOURED, tmp_path / name)
    found = contents(tmp_path / "a")
    assert found == contents(tmp_path / "b")
    assert len(found) == len(COLOURS) * sum(COUNTS.values())
    (tmp_path / "a" / "train" / "red_00.png").unlink()
    write_pictures(COLOURED, tmp_path / "a")  # a folder that is there is left as it is
    assert len(contents(tmp_path / "a")) == len(found) - 1


def test_a_part_that_failed_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()

    def broken() -> object:
        parts = COLOURED.make()

        def some() -> object:
            yield next(parts["reference"])
            raise OSError("the disk is full")

        return {**parts, "reference": some()}

    source = replace(COLOURED, make=broken)
    with pytest.raises(OSError, match="the disk is full"):
        write_pictures(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_read_pictures(tmp_path: Path) -> None:
    write_pictures(COLOURED, tmp_path)
    found = read_pictures(tmp_path / "held_out")
    assert found.class_names == tuple(COLOURS)
    assert np.bincount(found.labels).tolist() == [COUNTS["held_out"]] * 3
    for number, colour in enumerate(COLOURS.values()):
        assert np.abs(found.images[found.labels == number].mean((0, 1, 2)) - colour).max() < 3
    again = read_pictures(tmp_path / "held_out")
    assert found.digest == again.digest
    assert found.digest != read_pictures(tmp_path / "train").digest


def test_crops_for_judging_share_no_pixel_with_the_others() -> None:
    photo = np.concatenate([np.full((50, 51, 3), shade, np.uint8) for shade in (0, 255)], axis=1)
    found = {part: [pixels for _, pixels in images] for part, images in crops_of({"a": photo}, 8, COUNTS).items()}
    assert {part: len(images) for part, images in found.items()} == COUNTS
    assert all(pixels.shape == (8, 8, 3) for images in found.values() for pixels in images)
    for part in ("train", "reference"):
        assert np.max(found[part]) == 0
    assert np.min(found["held_out"]) == 255


def test_crops_of_each_part_and_photograph_are_others() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
    counts = dict.fromkeys(PARTS, 4)
    crops = [
        pixels.tobytes() for images in crops_of({"a": photo, "b": photo}, 16, counts).values() for _, pixels in images
    ]
    assert len(set(crops)) == len(crops)


@pytest.mark.parametrize(("name", "package"), [(PictureSet.DIGITS, "sklearn"), (PictureSet.PHOTOGRAPHS, "skimage")])
def test_without_the_package(name: PictureSet, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(lambda: write_pictures(SOURCES[name], tmp_path))
    assert "pip install scikit-learn scikit-image (extra 'quality')" in said
    assert not list(tmp_path.iterdir())


def test_digits() -> None:
    pytest.importorskip("sklearn")
    parts = {part: dict(images) for part, images in SOURCES[PictureSet.DIGITS].make().items()}
    assert {part: len(images) for part, images in parts.items()} == {"train": 1497, "reference": 1797, "held_out": 300}
    assert not set(parts["train"]) & set(parts["held_out"])
    assert set(parts["reference"]) == set(parts["train"]) | set(parts["held_out"])
    assert {name[0] for name in parts["held_out"]} == set("0123456789")
    assert next(iter(parts["train"].values())).shape == (32, 32, 3)


def test_photographs() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    for part, images in SOURCES[PictureSet.PHOTOGRAPHS].make().items():
        name, pixels = next(images)
        assert name == "chelsea_0000", part
        assert pixels.shape == (64, 64, 3)
