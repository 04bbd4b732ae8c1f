"""ImageNet's archives, and any others, as folders of images."""

from pathlib import Path

import numpy as np
import pytest

from fastdiff.data import ImageFolder, load
from fastdiff.data.imagenet import Extracted, prepare_imagenet

from .archive_support import found_below, png, tar, tar_bytes, zipped

CLASSES = {
    f"n0{c}": {f"n0{c}_{i}.JPEG": png(10 * c + i, 20 + i, 12) for i in range(3)} | {"readme.txt": b"x"} for c in (1, 2)
}
FILES = {f"{name}/{file}": content for name, files in CLASSES.items() for file, content in files.items()}
IMAGES = {name: content for name, content in FILES.items() if name.endswith("JPEG")}


def source(tmp_path: Path, kind: str) -> Path:
    if kind == "tar of tars":
        return tar(tmp_path / "x.tar", {f"{name}.tar": tar_bytes(files) for name, files in CLASSES.items()})
    if kind == "folder of tars":
        (tmp_path / "x").mkdir()
        for name, files in CLASSES.items():
            tar(tmp_path / f"x/{name}.tar", files)
        return tmp_path / "x"
    return zipped(tmp_path / "x.zip", FILES) if kind == "zip" else tar(tmp_path / "x.tar.gz", FILES, "w:gz")


@pytest.mark.parametrize("kind", ["tar of tars", "folder of tars", "zip", "tar.gz"])
def test_files_in_their_folders(tmp_path: Path, kind: str) -> None:
    found = prepare_imagenet(source(tmp_path, kind), tmp_path / "out")
    assert found == Extracted(6, 2, {"not an image": 2})
    assert found_below(tmp_path / "out") == {*CLASSES, *IMAGES}
    for name, content in IMAGES.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    by_name, by_folder = (ImageFolder(tmp_path / "out", 8, labels) for labels in ("prefix", "folder"))
    assert by_name.class_names == by_folder.class_names == tuple(CLASSES)
    np.testing.assert_array_equal(by_name.labels, by_folder.labels)


@pytest.mark.parametrize("kind", ["tar of tars", "zip"])
def test_smaller_files(tmp_path: Path, kind: str) -> None:

    path = source(tmp_path, kind)
    if kind == "zip":
        zipped(path, FILES | {"n01/n01_9.png": b"x"})
    found = prepare_imagenet(path, tmp_path / "out", image_size=8)
    broken = {"not a PNG, JPEG, GIF, WebP, BMP, TIFF or AVIF inside": 1} if kind == "zip" else {}
    assert found == Extracted(6, 2, {"not an image": 2} | broken)
    assert found_below(tmp_path / "out") == {*CLASSES, *(name.replace("JPEG", "png") for name in IMAGES)}
    for name, content in IMAGES.items():
        (tmp_path / "original.png").write_bytes(content)
        small = load(tmp_path / "out" / name.replace("JPEG", "png"), 8)
        np.testing.assert_array_equal(small, load(tmp_path / "original.png", 8))


def test_images_without_folders(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a_1.png": png(1), "b/a_2.png": png(2)})
    assert prepare_imagenet(path, tmp_path / "out", 8) == Extracted(2, 1, {})


def test_hidden_files_are_left_out_as_in_training(tmp_path: Path) -> None:
    members = {"a_1.png": png(1), ".x/a_2.png": png(2), "b/.a_3.png": png(3), "__MACOSX/._a_1.png": b"x"}
    assert prepare_imagenet(zipped(tmp_path / "x.zip", members), tmp_path / "out") == Extracted(1, 0, {"hidden": 3})
    assert found_below(tmp_path / "out") == {"a_1.png"}


def test_two_extensions(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a_1.jpg": png(1), "a_1.jpeg": png(2)})
    assert prepare_imagenet(path, tmp_path / "both").images == 2
    with pytest.raises(ValueError, match="a_1 with two extensions: rename one"):
        prepare_imagenet(path, tmp_path / "out", image_size=8)
    assert not (tmp_path / "out").exists()


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images that can be used"):
        prepare_imagenet(zipped(tmp_path / "x.zip", {"a.txt": b"x"}), tmp_path / "out")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"a folder without \.tar files: if it holds images, train on it directly"):
        prepare_imagenet(tmp_path / "images", tmp_path / "out")
    with pytest.raises(ValueError, match="image_size must be positive"):
        prepare_imagenet(tmp_path / "x.zip", tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("image_size", [None, 8])
def test_stopped_in_the_middle(tmp_path: Path, image_size: int | None) -> None:
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        assert 0 <= done <= total
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    path = source(tmp_path, "tar of tars")
    with pytest.raises(KeyboardInterrupt):
        prepare_imagenet(path, tmp_path / "out", image_size, on_progress=stop)
    assert found_below(tmp_path) == {"x.tar"}
