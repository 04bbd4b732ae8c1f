"""One-file data sets: the same images as the folder's, wherever they come from, and hostile files refused."""

import io
import itertools
import os
import re
import shutil
import stat
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.config import Cache, DataConfig
from fastdiff.data import Dataset, ImageFolder, LeftOut, UnreadableImage, batches, load_dataset, read_samples
from fastdiff.data.packing import pack_npz, pack_zip

from ..support import refusal
from .archive_support import UNSAFE, encrypted, found_below, png, zipped
from .support import noise, save

NAMES = ["B_1.png", "a_1.png", "m/a/b_2.jpg", "m/b_2.PNG", "m_0.gif"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five images in two classes and more, in the order of NAMES, one broken and other files among them."""
    root = tmp_path / "data"
    for i, name in enumerate(NAMES):
        save(root / name, noise(20 + i, 10 + i, seed=i))
    (root / "a_0.png").write_bytes(png()[:100])
    (root / "notes.txt").touch()
    save(root / ".hidden.png")
    return root


def loaded(path: Path, labels: str = "prefix", size: int = 8, labelled: bool = True, **options: object) -> Dataset:
    config = DataConfig(data_dir=str(path), labels=labels, cache_dir=str(path.parent / "cache"), **options)
    return load_dataset(config, size, labelled=labelled)


def packed(data: Path, kind: str) -> Path:
    out = data.parent / f"out.{kind}"
    if kind == "zip":
        pack_zip(data, out)
    else:
        pack_npz(DataConfig(data_dir=str(data)), out, 8)
    return out


def test_an_npz_without_classes_is_packed_without_classes(tmp_path: Path) -> None:
    images = np.stack([np.asarray(noise(8, 8, seed=i)) for i in range(3)])
    np.savez(tmp_path / "a.npz", np.moveaxis(images, 3, 1) / 255)
    pack_npz(DataConfig(data_dir=str(tmp_path / "a.npz")), tmp_path / "b.npz", 8)
    samples = read_samples(tmp_path / "b.npz")
    assert np.array_equal(samples.images, images)
    assert (samples.labels, samples.class_names, samples.names) == (None, None, ("0", "1", "2"))


def test_an_npz_holds_no_files_for_a_zip(data: Path) -> None:
    npz = packed(data, "npz")
    said = refusal(lambda: pack_zip(npz, data.parent / "out.zip"), re.escape(str(npz)))
    assert said.endswith("out.npz holds pixels, no image files: train on it as it is, or pack it as an .npz")
    assert not (data.parent / "out.zip").exists()


def test_of_files_with_one_name_in_a_zip_the_last_counts_and_the_others_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(("a.png", "b.png", "a.png")):
            with warnings.catch_warnings(action="ignore"):
                content = io.BytesIO()
                Image.new("RGB", (8, 8), (i, i, i)).save(content, "PNG")
                archive.writestr(name, content.getvalue())
    data = loaded(tmp_path / "a.zip")
    assert data.names == ("a.png", "b.png")
    assert data.images[:, 0, 0, 0].tolist() == [2, 1]
    assert data.preflight.left_out == (LeftOut("a.png", "another file of this name follows"),)


def test_a_zip_is_the_folder(data: Path) -> None:
    progress: list[tuple[int, int]] = []
    out = data.parent / "out.zip"
    assert pack_zip(data, out, lambda *at: progress.append(at)) == 6
    assert progress == [(i, 6) for i in range(1, 7)]
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["B_1.png", "a_0.png", *NAMES[1:]]
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            assert archive.read(info) == (data / info.filename).read_bytes()
    shutil.copytree(data, data.parent / "copy")
    pack_zip(data.parent / "copy", data.parent / "again.zip")
    assert (data.parent / "again.zip").read_bytes() == out.read_bytes()
    pack_zip(out, data.parent / "third.zip")  # a zip is a folder here, too
    assert (data.parent / "third.zip").read_bytes() == out.read_bytes()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((data / "notes.txt").stat().st_mode)


@pytest.mark.parametrize("cache", [Cache.MEMORY, Cache.DISK])
@pytest.mark.parametrize("labelled", [False, True])
def test_zip_and_folder_load_the_same(data: Path, cache: Cache, labelled: bool) -> None:
    (data / "notes.txt").unlink()
    folder, archive = (loaded(p, labelled=labelled, cache=cache) for p in (data, packed(data, "zip")))
    assert archive.names == folder.names == tuple(NAMES)
    assert archive.preflight == folder.preflight
    assert archive.preflight.left_out == (LeftOut("a_0.png", "truncated"),)
    assert archive.fingerprint == folder.fingerprint
    assert archive.class_names == folder.class_names
    np.testing.assert_array_equal(archive.images, folder.images)
    np.testing.assert_array_equal(archive.labels, folder.labels)
    for (one, _), (other, _) in itertools.islice(
        zip(batches(folder, DataConfig(), 2, 0, 0), batches(archive, DataConfig(), 2, 0, 0), strict=True), 5
    ):
        assert one.equal(other)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_image_folder_of_a_zip(data: Path, method: int) -> None:
    files = {name: (data / name).read_bytes() for name in NAMES}
    others = {"m/": b"", "notes.txt": b"", "scan.heic": b"", "__MACOSX/._a_1.png": b"x", ".x/a_3.png": b"x"}
    path = zipped(data.parent / "x.zip", dict(reversed((files | others).items())), method=method)
    folder = ImageFolder(path, 8)
    assert folder.names == NAMES
    assert folder.paths == [path / name for name in NAMES]
    assert {item.name: item.reason for item in folder.left_out} == {
        "notes.txt": "not an image",
        "scan.heic": "HEIC, which is not read: convert it to PNG",
    }
    original = ImageFolder(data, 8)
    for i, j in enumerate([0, 2, 3, 4, 5]):
        np.testing.assert_array_equal(folder[i][0], original[j][0])
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda i: folder[i % 5][0], range(200)))
    assert all(np.array_equal(image, folder[i % 5][0]) for i, image in enumerate(many))


def test_the_cache_of_a_zip(data: Path) -> None:
    path = packed(data, "zip")
    first = loaded(path, cache=Cache.DISK)
    moved = path.rename(path.with_name("moved.zip"))
    assert loaded(moved, cache=Cache.DISK).images.filename == first.images.filename
    save(data / "a_1.png", noise(21, 11, seed=9))
    pack_zip(data, path)
    again = loaded(path, cache=Cache.DISK)
    assert again.images.filename != first.images.filename
    assert not np.array_equal(again.images[1], first.images[1])


@pytest.mark.parametrize("damage", ["bytes", "encrypted", "deflate64", "bomb", "large"])
def test_members_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    good, bad = png(1, 40, 30), png(2, 40, 30)
    if damage == "encrypted":
        path = encrypted(zipped(tmp_path / "x.zip", {"b_1.png": bad}))
        with pytest.raises(UnreadableImage, match=r"x\.zip/b_1\.png: encrypted"):
            ImageFolder(path, 8)[0]
        return
    path = tmp_path / "x.zip"
    if damage == "bomb":
        monkeypatch.setattr("fastdiff.data.images.MAX_BYTES", 2**25)
        zipped(path, {"a_1.png": good, "b_1.png": bytes(2**25 + 1)})
    elif damage == "large":
        zipped(path, {"a_1.png": good, "b_1.png": bytes(6 * 2**24)})
    else:
        zipped(path, {"a_1.png": good, "b_1.png": bad}, method=zipfile.ZIP_STORED)
        content = bytearray(path.read_bytes())
        if damage == "bytes":
            content[content.index(bad) + len(bad) // 2] ^= 1
        else:
            for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
                content[content.rindex(signature) + place] = 9  # the method
        path.write_bytes(content)
    tracemalloc.start()
    try:
        dataset = loaded(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2**24  # zipfile reads 16 MiB at once
    assert dataset.names == ("a_1.png",)
    reason = {
        "bytes": "damaged",
        "deflate64": "compressed in a way",
        "bomb": "over the limit of 33,554,432 bytes",
        "large": "not a PNG, JPEG",
    }[damage]
    assert dataset.preflight.left_out[0].name == "b_1.png"
    assert dataset.preflight.left_out[0].reason.startswith(reason)


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "x.zip", {"a_1.png": png(), name: png()})
    refusal(lambda: ImageFolder(path, 8), "leads out of its folder")


def test_files_that_are_no_zip(data: Path) -> None:
    path = packed(data, "zip")
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"out\.zip is not a folder, nor a \.zip or \.npz"):
        ImageFolder(path, 8)
    broken = bytearray(content)
    broken[content.index(b"PK\1\2")] = 0  # where the directory begins
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"out\.zip is damaged or not a zip"):
        ImageFolder(path, 8)
    zipped(path, {"a.txt": b""})
    with pytest.raises(ValueError, match=r"no images in data_dir .*out\.zip.* found 1 .txt"):
        ImageFolder(path, 8)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_not_text(data: Path) -> None:
    (data / "a_1.png").rename(data / os.fsdecode(b"caf\xe9_1.png"))
    with pytest.raises(ValueError, match=r"caf.*_1\.png in .* is not in UTF-8: rename it"):
        packed(data, "zip")
    assert not (data.parent / "out.zip").exists()
    assert loaded(packed(data, "npz")).names == loaded(data).names


def test_an_npz_is_the_decoded_folder(data: Path) -> None:
    progress: list[tuple[int, int]] = []
    preflight = pack_npz(
        DataConfig(data_dir=str(data)), data.parent / "out.npz", 8, on_progress=lambda *at: progress.append(at)
    ).preflight
    assert progress == [(i, 6) for i in range(1, 7)]
    folder, npz = loaded(data), loaded(data.parent / "out.npz")
    assert preflight == folder.preflight
    assert isinstance(npz.images, np.memmap)
    np.testing.assert_array_equal(npz.images, folder.images)
    np.testing.assert_array_equal(npz.labels, folder.labels)
    assert (npz.class_names, npz.names) == (folder.class_names, folder.names)
    assert npz.preflight.line() == "5 images (5 npz, 8x8) in 4 classes: B, a, b, m"
    with np.load(data.parent / "out.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1", "class_names", "names"]
        assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    assert found_below(data.parent) - {f"data/{name}" for name in found_below(data)} == {"data", "out.npz"}


def test_labels_of_an_npz_are_its_own(tmp_path: Path) -> None:
    for name in ("x/a_1.png", "y/a_2.png", "y/b_1.png"):
        save(tmp_path / "data" / name)
    pack_npz(DataConfig(data_dir=str(tmp_path / "data"), labels="folder"), tmp_path / "out.npz", 8)
    for labels in ("prefix", "folder"):
        dataset = loaded(tmp_path / "out.npz", labels)
        assert (dataset.class_names, dataset.labels.tolist()) == (("x", "y"), [0, 1, 1])
    unlabelled = loaded(tmp_path / "out.npz", labelled=False)
    assert (unlabelled.labels, unlabelled.class_names) == (None, ())


def test_little_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the decoded images do not fit, they go through a file beside the npz, and nothing of it stays."""
    monkeypatch.setattr("fastdiff.data.cache.available_memory", lambda: 2**20)
    for i in range(20):
        save(tmp_path / "data" / f"a{i % 2}_{i}.png", noise(16, 16, seed=i))
    tracemalloc.start()
    try:
        pack_npz(DataConfig(data_dir=str(tmp_path / "data")), tmp_path / "out.npz", 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.npz").stat().st_size > 60 * 2**20
    assert peak < 40 * 2**20  # NumPy writes 16 MiB at once
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out.npz"}
    assert len(loaded(tmp_path / "out.npz", size=1024).images) == 20


def test_samples_are_data(tmp_path: Path) -> None:
    """The npz of improved-diffusion: no names."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = np.array([2, 0] * 6, np.int32)
    np.savez(tmp_path / "a.npz", images, labels)
    with pytest.warns(UserWarning, match=r"a\.npz has no class_names: its classes are called by their numbers"):
        dataset = loaded(tmp_path / "a.npz")
    assert (dataset.class_names, dataset.named) == (("0", "1", "2"), False)
    assert dataset.labels.tolist() == labels.tolist()
    assert dataset.labels.dtype == np.int64
    assert dataset.names[:3] == ("00", "01", "02")
    np.savez_compressed(tmp_path / "b.npz", np.asfortranarray(images), labels)
    other = loaded(tmp_path / "b.npz", labelled=False)
    assert other.images.flags.c_contiguous
    np.testing.assert_array_equal(other.images, images)
    np.savez(tmp_path / "c.npz", images)
    assert loaded(tmp_path / "c.npz", labelled=False).labels is None
    with pytest.raises(ValueError, match=r"c\.npz has no labels \(arr_1\), which --class-cond and classifiers need"):
        loaded(tmp_path / "c.npz")


@pytest.mark.filterwarnings("ignore:.*has no class_names")
def test_classes_from_one(tmp_path: Path) -> None:
    """Their numbers stay their names; a run that began with a class 0 without images goes on with it."""
    images = np.full((4, 8, 8, 3), 200, np.uint8)
    for labels, names in (([1, 2, 3, 1], "123"), ([2, 3, 2, 3], "0123"), ([1, 1, 1, 1], "01"), ([0, 2, 0, 2], "012")):
        np.savez(tmp_path / "a.npz", images, np.array(labels))
        dataset = loaded(tmp_path / "a.npz")
        assert dataset.class_names == tuple(names)
        assert [dataset.class_names[i] for i in dataset.labels] == list(map(str, labels))
    np.savez(tmp_path / "a.npz", images, np.array([1, 2, 3, 1]))
    earlier = load_dataset(DataConfig(data_dir=str(tmp_path / "a.npz")), 8, labelled=True, reading=1)
    assert earlier.class_names == tuple("0123")
    assert earlier.fingerprint != loaded(tmp_path / "a.npz").fingerprint


def test_an_npz_has_no_label_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.full((4, 8, 8, 3), 200, np.uint8))
    refusal(lambda: loaded(tmp_path / "a.npz", label_file="x.csv"), "holds its own classes; leave it out")


def test_label_files_are_packed(data: Path) -> None:
    """So that the zip is the same data set under any rule; other tables are not of it."""
    rows = "".join(f"{name},{'xy'[i % 2]}\n" for i, name in enumerate(["a_0.png", *NAMES]))
    (data / "metadata.csv").write_text(f"file_name,label\n{rows}")
    (data / "sales.csv").touch()
    out = packed(data, "zip")
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist()[-1] == "metadata.csv"
    folder, archive_ = loaded(data, "auto"), loaded(out, "auto")
    assert folder.class_names == archive_.class_names == ("x", "y")
    assert folder.fingerprint == archive_.fingerprint
    assert folder.notes == archive_.notes == ("labels: the classes come from metadata.csv",)


def test_another_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((2, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "b.npz", np.zeros((2, 16, 8, 3), np.uint8))
    remedy = "pack the images again with --image-size 8"
    with pytest.raises(ValueError, match=f"16x16 pixels, not 8x8: {remedy}, or train with --image-size 16$"):
        loaded(tmp_path / "a.npz", labelled=False)
    with pytest.raises(ValueError, match=f"8x16 pixels, not 8x8: {remedy}$"):
        loaded(tmp_path / "b.npz", labelled=False)


IMAGES = np.full((2, 8, 8, 3), 200, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_1": [0, -1]}, r"labels from -1 to 0, which must be from 0"),
        ({"arr_1": [0, 10**12]}, r"labels from 0 to 1000000000000"),
        ({"arr_1": [0, 2], "class_names": ["a", "b"]}, r"labels from 0 to 2, which must be from 0 to 1"),
        ({"arr_1": [0, 1], "class_names": np.array(["a", 3], object)}, "class_names"),
        ({"arr_1": [0, 1], "class_names": [["a", "b"]]}, r"\(1, 2\) as class_names"),
        ({"arr_1": [0, 1], "class_names": [1.0, 2.0]}, "float64 .* as class_names"),
        ({"arr_1": [0, 1], "names": ["a"]}, r"\(1,\) as names"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, **{name: np.asarray(value) for name, value in arrays.items()})
    refusal(lambda: loaded(tmp_path / "a.npz"), message)


def test_names_in_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", IMAGES, np.array([0, 1]), class_names=np.array([b"cat", b"caf\xe9"]))
    assert read_samples(tmp_path / "a.npz").class_names == ("cat", os.fsdecode(b"caf\xe9"))


@pytest.mark.filterwarnings("ignore:.*has no class_names")
def test_the_fingerprint_of_an_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)

    def fingerprint(name: str, *arrays: np.ndarray, labelled: bool = True, **more: np.ndarray) -> str:
        np.savez(tmp_path / name, *arrays, **more)
        return loaded(tmp_path / name, labelled=labelled).fingerprint

    labels = np.array([0, 1, 1])
    first = fingerprint("a.npz", images, labels)
    assert len(first) == 64
    assert fingerprint("b.npz", images, labels.astype(np.int32)) == first
    others = [
        fingerprint("c.npz", images, labels[::-1]),
        fingerprint("d.npz", images ^ 1, labels),
        fingerprint("e.npz", images, labels, class_names=np.array(["x", "y"])),
        fingerprint("f.npz", images, labels, names=np.array(["x", "y", "z"])),
        fingerprint("g.npz", images, labels, labelled=False),
        fingerprint("h.npz", images[:2], labels[:2]),
    ]
    assert len({first, *others}) == 7


def test_an_npz_that_loses_its_end(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.full((100, 8, 8, 3), 200, np.uint8))
    dataset = loaded(tmp_path / "a.npz", labelled=False)
    dataset.check()
    os.truncate(tmp_path / "a.npz", 10_000)
    with pytest.raises(OSError, match=r"a\.npz, .* has lost [\d,]+ bytes while in use; restore it and continue with"):
        dataset.check()


def test_nothing_is_overwritten_or_left(data: Path) -> None:
    before = found_below(data.parent)
    for kind in ("zip", "npz"):
        packed(data, kind)
        with pytest.raises(ValueError, match=f"out.{kind} exists already"):
            packed(data, kind)
        (data.parent / f"out.{kind}").unlink()

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_zip(data, data.parent / "out.zip", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_npz(DataConfig(data_dir=str(data)), data.parent / "out.npz", 8, on_progress=stop)
    with pytest.raises(ValueError, match="does not exist"):
        pack_zip(data.parent / "nowhere", data.parent / "out.zip")
    assert found_below(data.parent) == before


def test_one_class_warns(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "data" / f"cat_{i}.png")
    with pytest.warns(UserWarning, match=r"data has one class \(cat\): class labels teach the model nothing"):
        loaded(tmp_path / "data")
    loaded(tmp_path / "data", labelled=False)  # warnings are errors
    np.savez(tmp_path / "a.npz", IMAGES, np.zeros(2, int), class_names=["0"])
    with pytest.warns(UserWarning, match=r"a\.npz has one class \(0\)"):
        loaded(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("classes", "images", "warned"), [(11, 11, True), (7, 12, True), (6, 12, False), (10, 10, False)]
)
def test_a_class_for_nearly_every_image_warns(tmp_path: Path, classes: int, images: int, warned: bool) -> None:
    for i in range(images):
        save(tmp_path / "data" / f"{i % classes}_{i}.png")
    if warned:
        with pytest.warns(
            UserWarning, match=rf"data has {classes} classes in {images} images, nearly one class per image"
        ):
            loaded(tmp_path / "data")
    else:
        loaded(tmp_path / "data")
