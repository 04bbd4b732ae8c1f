"""What a super-resolution model enlarges, from an npz or a folder, with its classes."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import UnreadableImage, load
from fastdiff.data import dataset as dataset_module
from fastdiff.sampling.base_samples import load_base_samples, unreadable_in
from fastdiff.sampling.output import save_png

from ..support import refusal

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 2])
CLASSES = ("cat", "dog", "great_dane")
NUMBERS = np.array([4, 0, 7, 5, 12])


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "small.npz", IMAGES, LABELS, class_names=CLASSES)
    return tmp_path / "small.npz"


def folder(root: Path, *names: str) -> Path:
    """PNG files of these names with the pictures IMAGES[0], IMAGES[1], ... in this order."""
    for name, image in zip(names, IMAGES, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(root / name, image)
    return root


def refused(path: Path, class_names: tuple[str, ...] | None, small_size: int = 4) -> str:
    return refusal(lambda: load_base_samples(path, small_size, class_names), re.escape(str(path)))


def labels_in(root: Path, class_names: tuple[str, ...] = CLASSES) -> list[int]:
    labels = load_base_samples(root, 4, class_names).labels
    assert labels is not None
    assert labels.dtype == np.int64
    return labels.tolist()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_with_classes(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", IMAGES, LABELS, class_names=CLASSES)
    samples = load_base_samples(tmp_path / "a.npz", 4, CLASSES)
    assert len(samples) == 5
    batch = samples.batch(NUMBERS)
    assert type(batch) is np.ndarray
    assert batch.flags.writeable
    assert np.array_equal(batch, IMAGES[[4, 0, 2, 0, 2]])
    labels = samples.labels_of(NUMBERS)
    assert labels is not None
    assert labels.tolist() == [2, 2, 1, 2, 1]


def test_a_zip_is_the_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "small", "cat/0.png", "dog/1.png", "great_dane_2.png")
    (root / "cat" / "9.png").write_bytes(b"no image")
    packed = Path(shutil.make_archive(str(tmp_path / "small"), "zip", root))
    assert unreadable_in(packed) == unreadable_in(root)
    assert list(unreadable_in(packed)) == ["cat/9.png"]
    ours, theirs = (load_base_samples(path, 4, CLASSES, skipped=unreadable_in(path)) for path in (packed, root))
    numbers = np.arange(3)
    assert np.array_equal(ours.batch(numbers), theirs.batch(numbers))
    for samples in (ours, theirs):
        samples.check(numbers)
        labels = samples.labels_of(numbers)
        assert labels is not None
        assert labels.tolist() == [0, 1, 2]
    assert ours.described() == theirs.described()
    assert ours.described()[0] == f"cat/0.png {(root / 'cat' / '0.png').stat().st_size}"


def test_an_npz_without_classes(npz: Path) -> None:
    samples = load_base_samples(npz, 4, None)
    assert samples.labels is None
    assert samples.labels_of(NUMBERS) is None
    assert np.array_equal(samples.batch(NUMBERS), IMAGES[NUMBERS % 5])


def test_the_home_folder(npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(npz.parent))
    assert len(load_base_samples(Path("~/small.npz"), 4, None)) == 5


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (6, 4), (4, 6)])
def test_an_npz_of_another_size(tmp_path: Path, shape: tuple[int, int]) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, *shape, 3), np.uint8))
    message = refused(tmp_path / "a.npz", None, small_size=6)
    assert f"holds images of {shape[1]}x{shape[0]} pixels, and the model enlarges 6x6: give" in message


def test_an_npz_without_the_labels_that_the_model_needs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES)
    assert "has no labels, which this model needs: save them" in refused(tmp_path / "a.npz", CLASSES)
    assert "has no labels, which this model needs: save them" in refused(tmp_path / "a.npz", ())


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_an_npz_with_a_label_that_the_model_does_not_have(tmp_path: Path, label: int) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, np.array([0, 1, label, 2, -5]))
    assert "has the class -5, but the model has the classes 0 to 2: give" in refused(tmp_path / "a.npz", CLASSES)
    np.savez(tmp_path / "b.npz", IMAGES, np.array([0, 1, label, 2, 0]))
    assert f"has the class {label}, but the model has the classes 0 to 2: give" in refused(tmp_path / "b.npz", CLASSES)
    assert load_base_samples(tmp_path / "a.npz", 4, None).labels is None


def test_classes_without_names(tmp_path: Path, npz: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, np.array([0, 1, 9, 0, 5]))
    with pytest.warns(UserWarning, match="has no class_names"):
        samples = load_base_samples(tmp_path / "a.npz", 4, (), 10)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 9, 0, 5]
    with pytest.raises(ValueError, match="has the class 9, but the model has the classes 0 to 8: give"):
        load_base_samples(tmp_path / "a.npz", 4, (), 9)
    with pytest.warns(UserWarning, match="the model has no class names: the classes of .* 0 being cat"):
        load_base_samples(npz, 4, (), 9)
    numbered = load_base_samples(folder(tmp_path / "g", "7_000000.png", "10_000001.png"), 4, (), 11)
    assert numbered.labels is not None
    assert numbered.labels.tolist() == [10, 7]
    message = refused(folder(tmp_path / "f", "cat_1.png"), ())
    assert message.endswith("the model's classes have no names to match with its files: give an npz with labels")


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist: give" in refused(tmp_path / "a.npz", None)
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(tmp_path / "empty", None)
    (tmp_path / "a.npz").touch()
    assert "damaged or not an npz file" in refused(tmp_path / "a.npz", None)


def test_a_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", "b.png", "c.png", "sub/a.png")
    samples = load_base_samples(root, 4, None)
    assert len(samples) == 3
    assert np.array_equal(samples.batch(NUMBERS), IMAGES[NUMBERS % 3])
    assert samples.labels is None


def test_a_folder_of_any_images(tmp_path: Path) -> None:
    for name, size in (("a.png", (20, 9)), ("b.jpg", (4, 4)), ("c.gif", (3, 2))):
        (tmp_path / "f").mkdir(exist_ok=True)
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "f" / name)
    batch = load_base_samples(tmp_path / "f", 4, None).batch(np.arange(3))
    assert (batch.shape, batch.dtype) == ((3, 4, 4, 3), np.uint8)
    for image, name in zip(batch, ("a.png", "b.jpg", "c.gif"), strict=True):
        assert np.array_equal(image, load(tmp_path / "f" / name, 4))


def test_only_what_is_asked_for_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counting(path: Path, *how: object) -> np.ndarray:
        decoded.append(path.name)
        return load(path, *how)

    root = folder(tmp_path / "f", "cat_0.png", "cat_1.png", "cat_2.png", "cat_3.png")
    monkeypatch.setattr(dataset_module, "load", counting)
    samples = load_base_samples(root, 4, CLASSES)
    assert samples.labels_of(np.arange(4)) is not None
    assert not decoded
    samples.batch(np.array([3, 5]))
    assert decoded == ["cat_3.png", "cat_1.png"]


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", "a.png", "b.png")
    (root / "b.png").write_bytes((root / "b.png").read_bytes()[:60])
    samples = load_base_samples(root, 4, None)
    assert np.array_equal(samples.batch(np.array([0, 2])), IMAGES[[0, 0]])
    with pytest.raises(UnreadableImage, match=r"b\.png: truncated"):
        samples.batch(np.array([0, 1]))


def test_all_are_looked_at_before_the_first(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", "a.png", "b.png", "c.png", "d.png")
    for name in "bc":
        (root / f"{name}.png").write_bytes((root / f"{name}.png").read_bytes()[:60])
    samples = load_base_samples(root, 4, None)
    message = refusal(lambda: samples.check(np.arange(9)), "base_samples")
    assert message == (
        f"base_samples {root}: 2 of 4 images cannot be read: b.png (truncated), c.png (truncated); repair or remove "
        "them, or leave them out with --skip-unreadable"
    )
    seen: list[tuple[int, int]] = []
    samples.check(np.array([0, 4, 7]), lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    skipped = unreadable_in(root)
    assert skipped == {"b.png": "truncated", "c.png": "truncated"}
    some = load_base_samples(root, 4, None, skipped=skipped)
    assert np.array_equal(some.batch(np.arange(3)), IMAGES[[0, 3, 0]])
    assert some.described() == [f"{name}.png {(root / f'{name}.png').stat().st_size}" for name in "ad"]


def test_an_npz_is_looked_at_as_it_is_read(npz: Path) -> None:
    samples = load_base_samples(npz, 4, None)
    samples.check(NUMBERS)
    assert (samples.described(), unreadable_in(npz), unreadable_in(None)) == ([], {}, {})


def test_odd_metadata_is_no_reason_to_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would, in the middle of a progress bar."""
    root = folder(tmp_path / "f", "a.png")

    def warning(path: Path, *how: object) -> np.ndarray:
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, module="PIL.TiffImagePlugin")
        return load(path, *how)

    monkeypatch.setattr(dataset_module, "load", warning)
    assert np.array_equal(load_base_samples(root, 4, None).batch(np.array([0])), IMAGES[:1])


def test_classes_by_prefix(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", "cat_1.png", "cat_1_2.png", "dog_1.png", "other/cat_7.png", "other/dog_3.png")
    assert labels_in(root) == [0, 0, 1, 0, 1]


def test_classes_by_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", "cat/1.png", "cat/old/dog_2.png", "dog/x_1.png", "great_dane/y.png")
    assert labels_in(root) == [0, 0, 1, 2]


def test_the_longest_class_is_the_one(tmp_path: Path) -> None:
    root = folder(tmp_path / "f", "cat_000000.png", "great_000001.png", "great_dane_000002.png", "great_dane_x_3.png")
    assert labels_in(root, ("cat", "great", "great_dane")) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("class_name", "file"),
    [("a/b", "a%2Fb_0.png"), ("a\\b", "a%5Cb_0.png"), ("a_b", "a%5Fb_0.png"), ("..x", "%2E.x_0.png")],
)
def test_names_that_no_file_can_have(tmp_path: Path, class_name: str, file: str) -> None:
    assert labels_in(folder(tmp_path / "f", file), ("a", class_name)) == [1]
    assert labels_in(folder(tmp_path / "g", file), ("a", class_name, file.split("_")[0])) == [
        1
    ]  # whose own is coded, too


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cta_1.png", "there are cat and more"),
        ("cat.png", "there are cat and more"),
        ("dgo/img_1.png", "there are dog and more"),
        ("xyz_1.png", "there are cat, dog, great_dane"),
    ],
)
def test_an_unknown_class(tmp_path: Path, name: str, near: str) -> None:
    message = refused(folder(tmp_path / "f", "dog_1.png", name), CLASSES)
    assert message.startswith(
        f"{name} in {tmp_path / 'f'} matches no class of the model, neither by file name nor by folder: "
    )
    assert message.endswith(f"rename it; {near}")


def test_many_classes(tmp_path: Path) -> None:
    message = refused(folder(tmp_path / "f", "xyz_1.png"), tuple(f"{i:05d}" for i in range(1000)))
    assert message.endswith("there are " + ", ".join(f"{i:05d}" for i in range(10)) + " and more")


def test_names_with_line_breaks(tmp_path: Path) -> None:
    refused(folder(tmp_path / "f", "x\ny_1.png"), ("x\nz",))
