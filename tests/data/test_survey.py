"""The close look: counts, classes, what cannot be read, what is doubtful, and what is shown."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastdiff.config import DataConfig
from fastdiff.data import LeftOut, load
from fastdiff.data.loading import load_dataset
from fastdiff.data.packing import pack_npz, pack_zip
from fastdiff.data.survey import SHOWN, Survey
from fastdiff.data.survey import survey as survey_of
from fastdiff.data.threads import Progress

from .support import noise, save


def survey(path: Path, image_size: int | None = None, on_progress: Progress | None = None, **options: object) -> Survey:
    return survey_of(DataConfig(data_dir=str(path), **options), image_size, on_progress)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve cats, two of them alike, three dogs, of which one cannot be read, and a text."""
    root = tmp_path / "data"
    for i in range(12):
        save(root / f"cat_{i:02}.png", noise(20, 10 + i, seed=max(1, i)))
    save(root / "cat_00.png", noise(20, 11, seed=1))
    for i in range(2):
        save(root / f"dog_{i}.jpg", noise(30, 40, seed=20 + i))
    (root / "dog_9.png").write_bytes(b"")
    (root / "notes.txt").touch()
    return root


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder(data: Path, kind: str) -> None:
    path = data
    if kind == "zip":
        path = data.parent / "out.zip"
        pack_zip(data, path)
    progress: list[tuple[int, int]] = []
    found = survey(path, 16, on_progress=lambda *at: progress.append(at))
    assert progress == [(i, 15) for i in range(1, 16)]
    assert found.preflight.counts == {"png": 12, "jpg": 2}
    assert (found.preflight.smallest, found.preflight.largest) == ((20, 11), (30, 40))
    assert found.preflight.left_out == ((LeftOut("notes.txt", "not an image"),) if kind == "folder" else ())
    assert found.unreadable == (LeftOut("dog_9.png", "empty file"),)
    assert found.class_counts == {"cat": 12, "dog": 2}
    assert found.captions == ("cat",) * 12 + ("dog",) * 2
    assert (found.shown.shape, found.shown.dtype) == ((14, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(found.shown[-1], load(data / "dog_1.jpg", 16))
    assert found.doubts == (
        "6 images smaller than 16 pixels, which will be enlarged and blurred: "
        "cat_00.png, cat_01.png, cat_02.png, cat_03.png, cat_04.png and 1 more",
        "1 image with the same pixels as another, at 16x16: cat_01.png is cat_00.png",
        "1 of 2 classes with fewer than 10 images: dog",
    )


def test_64_pixels_unless_told_otherwise(data: Path) -> None:
    assert survey(data).shown.shape[1:] == (64, 64, 3)


@pytest.mark.parametrize(
    ("dtype", "most", "peak", "factor"),
    [
        (np.uint8, 16, 16, "15.9"),  # scikit-learn's digits
        (np.uint16, 1, 1, "255"),
        (np.float32, 0.1, 26, "9.81"),
        (np.uint8, 31, 31, "8.23"),
    ],
)
def test_an_npz_that_is_nearly_black(tmp_path: Path, dtype: type, most: float, peak: int, factor: str) -> None:
    """As a folder of 16-bit images is."""
    images = (np.random.default_rng(0).random((12, 8, 8, 3)) * most).astype(dtype)
    images[7, 0, 0, 0] = most
    np.savez(tmp_path / "a.npz", images)
    said = (
        f"no value above {peak} of 255 in any image, which are nearly black: multiply the values by {factor}, which "
        f"makes {peak} white, and save it again"
    )
    assert survey(tmp_path / "a.npz").doubts[0] == said
    with pytest.warns(UserWarning, match=re.escape(f"a.npz has {said}")):
        load_dataset(DataConfig(data_dir=str(tmp_path / "a.npz")), 8, labelled=False)


def test_an_npz_with_some_dark_images_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.data.loading._AT_ONCE", 500)
    images = np.zeros((12, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0], images[11, 3, 3, 1] = np.arange(12), 32
    np.savez(tmp_path / "a.npz", images)
    assert survey(tmp_path / "a.npz").doubts == ()


def test_an_npz(data: Path) -> None:
    with_few = data.parent / "out.npz"
    pack_npz(DataConfig(data_dir=str(data)), with_few, 8)
    found = survey(with_few)
    assert (found.image_size, found.preflight.counts, found.unreadable) == (8, {"npz": 14}, ())
    assert found.class_counts == {"cat": 12, "dog": 2}
    assert found.captions[-1] == "dog"
    assert found.doubts[-1] == "1 of 2 classes with fewer than 10 images: dog"
    with pytest.raises(ValueError, match="8x8 pixels, not 16x16"):
        survey(with_few, 16)
    np.savez(data.parent / "bare.npz", noise_images(3))
    bare = survey(data.parent / "bare.npz")
    assert (bare.class_counts, bare.captions, bare.doubts) == ({}, ("0", "1", "2"), ())


def noise_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_the_shown_are_spread_evenly(tmp_path: Path) -> None:
    images = noise_images(1000)
    np.savez(tmp_path / "a.npz", images, np.arange(1000) // 500)
    found = survey(tmp_path / "a.npz")
    assert len(found.shown) == SHOWN == 100
    assert found.captions.count("0") == found.captions.count("1") == 50
    np.testing.assert_array_equal(found.shown[[0, -1]], images[[0, -1]])


@pytest.mark.parametrize(
    ("names", "doubt"), [(["a_1", "a_2"], "one class"), ([f"{i}" for i in range(11)], "11 classes")]
)
def test_classes_that_teach_nothing(tmp_path: Path, names: list[str], doubt: str) -> None:
    for i, name in enumerate(names):
        save(tmp_path / f"{name}.png", noise(64, 64, seed=i))
    (found,) = survey(tmp_path).doubts
    assert found.startswith(doubt)


def test_what_cannot_be_used(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png"):
        save(tmp_path / "data" / name)
    with pytest.raises(ValueError, match=r"a\.png lies in .* itself"):
        survey(tmp_path / "data", labels="folder")
    with pytest.raises(ValueError, match="does not exist"):
        survey(tmp_path / "nowhere")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").touch()
    with pytest.raises(ValueError, match="none of the 1 images"):
        survey(tmp_path / "bad")
