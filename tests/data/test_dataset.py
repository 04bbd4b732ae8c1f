"""The folder: what is found, in which order, with which class, and what is said about the rest."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastdiff.data import EXTENSIONS, Decoding, ImageFolder, LeftOut, Preflight, UnreadableImage

from ..support import refusal
from .archive_support import zipped
from .support import save


def left_out(folder: ImageFolder) -> dict[str, str]:
    return {item.name: item.reason for item in folder.left_out}


def test_order_is_by_name_with_folders_in_their_place(tmp_path: Path) -> None:
    names = ["B_2.png", "a_1.png", "m/z_1.png", "m/a/b_1.png", "z_1.png", "m_0.png"]
    for name in names:
        save(tmp_path / name)
    folder = ImageFolder(tmp_path, 8)
    assert folder.names == ["B_2.png", "a_1.png", "m/a/b_1.png", "m/z_1.png", "m_0.png", "z_1.png"]
    assert folder.paths == [tmp_path / name for name in folder.names]


def test_prefix_labels(tmp_path: Path) -> None:
    for name in ("dog_1.png", "cat_1_2.png", "sub/dog_2.png", "zebra.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path, 8)
    assert folder.class_names == ("cat", "dog", "zebra.png")
    assert folder.labels is not None
    assert folder.labels.dtype == np.int64
    assert folder.labels.tolist() == [0, 1, 1, 2]


def test_folder_labels_are_the_first_component(tmp_path: Path) -> None:
    for name in ("dog/x_1.png", "cat/y.png", "dog/old/cat_2.png"):
        save(tmp_path / name)
    folder = ImageFolder(str(tmp_path), 8, labels="folder")
    assert folder.class_names == ("cat", "dog")
    assert folder.labels is not None
    assert folder.labels.tolist() == [0, 1, 1]


def test_folder_labels_refuse_a_file_outside_of_the_folders(tmp_path: Path) -> None:
    save(tmp_path / "dog/x.png")
    save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png lies in .* itself .* labels prefix"):
        ImageFolder(tmp_path, 8, labels="folder")


def test_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "cat_1.png")
    folder = ImageFolder(tmp_path, 8, labels=None)
    assert folder.class_names == ()
    assert folder.labels is None
    assert folder[0][1] is None


def test_items(tmp_path: Path) -> None:
    save(tmp_path / "a_1.png")
    save(tmp_path / "b_1.png")
    folder = ImageFolder(tmp_path, 8)
    image, label = folder[1]
    assert len(folder) == 2
    assert (image.shape, image.dtype, label) == ((8, 8, 3), np.uint8, 1)
    (tmp_path / "b_1.png").write_bytes(b"")
    with pytest.raises(UnreadableImage, match=r"b_1\.png: empty file"):
        folder[1]


def test_extensions_in_any_case(tmp_path: Path) -> None:
    for i, extension in enumerate(EXTENSIONS):
        save(tmp_path / f"a_{i}.{extension.upper() if i % 2 else extension}", format="PNG")
    assert len(ImageFolder(tmp_path, 8)) == len(EXTENSIONS) == 14


def test_other_files_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("scan.HEIC", "raw.nef", "notes.txt", "png", "archive.png.zip"):
        (tmp_path / name).touch()
    assert left_out(ImageFolder(tmp_path, 8)) == {
        "scan.HEIC": "HEIC, which is not read: convert it to PNG",
        "raw.nef": "camera raw, which is not read: convert it to PNG",
        "notes.txt": "not an image",
        "png": "not an image",
        "archive.png.zip": "not an image",
    }


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_file_without_an_extension_counts_by_its_content(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    for name, form in (("a", "PNG"), ("b_1", "TIFF"), ("c.png", "PNG"), ("d", "JPEG")):
        save(root / name, format=form)
    (root / "heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / "license").write_text("BMW may use this")
    (root / "empty").touch()
    if kind == "zip":
        zipped(tmp_path / "a.zip", {path.name: path.read_bytes() for path in root.iterdir()})
        root = tmp_path / "a.zip"
    folder = ImageFolder(root, 8)
    assert folder.names == ["a", "b_1", "c.png", "d"]
    assert left_out(folder) == {
        "empty": "not an image",
        "heic": "HEIC, which is not read: convert it to PNG",
        "license": "not an image",
    }
    assert folder[1][0].shape == (8, 8, 3)


def test_the_first_rules(tmp_path: Path) -> None:
    for name in ("a.png", "b.tif", "c.jfif", "d", "e.avif"):
        save(tmp_path / name, format="PNG")
    assert ImageFolder(tmp_path, 8, decoding=Decoding(reading=1)).names == ["a.png"]
    assert len(ImageFolder(tmp_path, 8)) == 5


def test_only_some(tmp_path: Path) -> None:
    for name in ("a_1.png", "b_1.png", "b_2.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path, 8)
    some = folder.only([0, 2])
    assert (some.names, some.paths) == (["a_1.png", "b_2.png"], [tmp_path / "a_1.png", tmp_path / "b_2.png"])
    assert [some[i][1] for i in range(2)] == [0, 1]
    assert len(folder) == 3


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".thumbs/b.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path, 8)
    assert folder.names == ["a.png"]
    assert folder.left_out == []


def test_a_folder_named_like_an_image(tmp_path: Path) -> None:
    save(tmp_path / "x.png" / "a.png")
    assert ImageFolder(tmp_path, 8).names == ["x.png/a.png"]


def test_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    save(root / "a/1.png")
    save(tmp_path / "neighbour.png")
    save(tmp_path / "elsewhere/2.png")
    (root / "a/self").symlink_to(root / "a")
    (root / "b").symlink_to(root / "a")
    (root / "up").symlink_to(tmp_path)
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (root / "file.png").symlink_to(tmp_path / "neighbour.png")
    (root / "gone.png").symlink_to(tmp_path / "gone")
    (root / "circle.png").symlink_to(root / "circle.png")
    folder = ImageFolder(root, 8)
    assert folder.names == ["a/1.png", "file.png", "other/2.png"]
    assert left_out(folder) == {"gone.png": "broken link", "circle.png": "broken link"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert left_out(ImageFolder(tmp_path, 8)) == {"pipe.png": "not a regular file"}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "secret/b.png")
    listdir = os.listdir

    def denied(path: Path) -> list[str]:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", denied)
    folder = ImageFolder(tmp_path, 8)
    assert folder.names == ["a.png"]
    assert left_out(folder) == {"secret": "permission denied"}


def test_names_that_are_not_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9_1.png")
    save(tmp_path / "a.png").rename(tmp_path / name)
    folder = ImageFolder(tmp_path, 8)
    assert folder.names == [name]
    assert folder[0][1] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text("x"), "is not a folder"),
        (lambda p: np.save(p, [1]), r"data\.npy is one array: save it with np\.savez"),
        (lambda p: p.mkdir(), r"no images in .* looked for \.jpg .* found no files"),
        (lambda p: (p.mkdir(), (p / "a.heic").touch()), r"no images in .* found 1 \.heic"),
    ],
)
def test_no_data(tmp_path: Path, make: object, message: str) -> None:
    place = tmp_path / ("data.npy" if "npy" in message else "data")
    make(place)  # type: ignore[operator]
    refusal(lambda: ImageFolder(place, 8), message)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data_dir is empty"):
        ImageFolder("", 8)
    with pytest.raises(ValueError, match="image_size must be positive, not 0"):
        ImageFolder(tmp_path, 0)
    with pytest.raises(ValueError, match="labels must be one of auto, prefix, folder, not 'x'"):
        ImageFolder(tmp_path, 8, labels="x")


def test_preflight_line() -> None:
    bad = (LeftOut("broken.png", "truncated"), LeftOut("notes.txt", "not an image"))
    preflight = Preflight({"jpg": 2, "png": 1797}, ("0", "1"), (8, 8), (640, 480), bad)
    assert preflight.line() == (
        "1,799 images (1,797 png, 2 jpg, 8x8 to 640x480) in 2 classes: 0, 1; "
        "left out 2: broken.png (truncated), notes.txt (not an image)"
    )


def test_preflight_line_of_little() -> None:
    assert Preflight({"png": 1}, (), (8, 8), (8, 8), ()).line() == "1 image (1 png, 8x8)"
    assert Preflight({"png": 1}, ("a",), (8, 8), (8, 8), ()).line() == "1 image (1 png, 8x8) in 1 class: a"


def test_preflight_line_stays_short_and_on_one_line() -> None:
    bad = tuple(LeftOut(f"{i}\n\x1b[2J.txt", "not an image") for i in range(1700))
    classes = tuple(str(i) for i in range(1000))
    line = Preflight({"png": 1}, classes, (8, 8), (8, 8), bad).line()
    assert "in 1,000 classes: 0, 1, 2, 3, 4, … and 995 more; left out 1,700: 0" in line
    assert line.endswith("(not an image), … and 1,695 more")
    assert line.isprintable()
