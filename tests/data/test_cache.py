"""Decoding a folder once: into memory or into a file that is whole or absent, found again, and never just trusted."""

import hashlib
import json
import os
import shutil
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastdiff.config import Cache, DataConfig
from fastdiff.data import ImageFolder, LeftOut, load_dataset
from fastdiff.data import cache as module
from fastdiff.data.images import load

from .support import BROKEN_EXIF, noise, save


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four good images of different sizes, two bad ones among them, and a file of another kind."""
    root = tmp_path / "data"
    for i, name in enumerate(["a_1.png", "b_1.jpg", "c_2.png", "sub/b_2.PNG"]):
        save(root / name, noise(20 + i, 10 + i, seed=i))
    (root / "a_0.png").write_bytes(b"")
    (root / "c_1.png").write_bytes((root / "c_2.png").read_bytes()[:300])
    (root / "notes.txt").touch()
    return root


def config(data: Path, cache: Cache = Cache.DISK, **options: object) -> DataConfig:
    return DataConfig(data_dir=str(data), cache=cache, cache_dir=str(data.parent / "cache"), **options)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    decoded: list[Path] = []
    load_described = module.load_described

    def counting(path: Path, *how: object) -> object:
        decoded.append(path)
        return load_described(path, *how)

    monkeypatch.setattr(module, "load_described", counting)
    return decoded


@pytest.mark.parametrize("cache", [Cache.MEMORY, Cache.DISK])
def test_readable_images_in_order_without_holes(data: Path, cache: Cache) -> None:
    dataset = load_dataset(config(data, cache), 8, labelled=True)
    names = ["a_1.png", "b_1.jpg", "c_2.png", "sub/b_2.PNG"]
    assert isinstance(dataset.images, np.memmap) == (cache is Cache.DISK)
    assert (dataset.images.shape, dataset.images.dtype) == ((4, 8, 8, 3), np.uint8)
    for image, name in zip(dataset.images, names, strict=True):
        np.testing.assert_array_equal(image, load(data / name, 8))
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.labels.dtype) == ([0, 1, 2, 1], np.int64)
    assert dataset.preflight.counts == {"png": 3, "jpg": 1}
    assert dataset.preflight.left_out == (
        LeftOut("a_0.png", "empty file"),
        LeftOut("c_1.png", "truncated"),
        LeftOut("notes.txt", "not an image"),
    )
    assert (dataset.preflight.smallest, dataset.preflight.largest) == ((20, 10), (23, 13))


def test_a_class_without_a_readable_image_keeps_its_number(data: Path) -> None:
    (data / "a_1.png").write_bytes(b"")
    dataset = load_dataset(config(data, Cache.MEMORY), 8, labelled=True)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 2, 1]


def test_unlabelled(data: Path) -> None:
    dataset = load_dataset(config(data, Cache.MEMORY, labels="folder"), 8, labelled=False)
    assert dataset.labels is None
    assert dataset.class_names == ()


@pytest.mark.parametrize("cache", [Cache.MEMORY, Cache.DISK])
def test_strict_names_the_first_and_the_count(data: Path, cache: Cache) -> None:
    for _ in range(2):  # the second time from the file
        with pytest.raises(ValueError, match=r"strict: 2 of 6 images .* the first is a_0\.png \(empty file\)"):
            load_dataset(config(data, cache, strict=True), 8, labelled=True)


def test_strict_accepts_a_clean_folder(data: Path) -> None:
    (data / "a_0.png").unlink()
    (data / "c_1.png").unlink()
    assert len(load_dataset(config(data, strict=True), 8, labelled=True).images) == 4


@pytest.mark.parametrize("cache", [Cache.MEMORY, Cache.DISK])
def test_nothing_readable(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 images .* x\.png \(empty file\)"):
        load_dataset(config(tmp_path / "data", cache), 8, labelled=False)
    assert list(tmp_path.glob("cache/*")) == []


def test_progress(data: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_dataset(config(data), 8, labelled=False, on_progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_odd_metadata_gives_no_warning(data: Path) -> None:
    png = (data / "a_1.png").read_bytes()
    chunk = b"acTL" + bytes(8)  # an animation of no frames
    crc = zlib.crc32(chunk).to_bytes(4, "big")
    (data / "a_1.png").write_bytes(png[:33] + (8).to_bytes(4, "big") + chunk + crc + png[33:])
    save(data / "b_1.jpg", exif=BROKEN_EXIF)
    for name, warning in (("a_1.png", "Invalid APNG"), ("b_1.jpg", "Corrupt EXIF|Truncated")):
        with pytest.warns(UserWarning, match=warning):
            Image.open(data / name).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_dataset(config(data, Cache.MEMORY), 8, labelled=False).images) == 4


def test_file_is_found_again_and_nothing_is_decoded(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decoded(monkeypatch)
    first = load_dataset(config(data), 8, labelled=True)
    assert len(decoded) == 6
    again = load_dataset(config(data), 8, labelled=True)
    assert len(decoded) == 6
    np.testing.assert_array_equal(again.images, first.images)
    assert again.preflight == first.preflight
    assert again.labels is not None
    np.testing.assert_array_equal(again.labels, first.labels)
    load_dataset(config(data), 16, labelled=True)
    assert len(decoded) == 12  # another size is another file
    assert sorted(p.suffix for p in (data.parent / "cache").iterdir()) == [".json", ".json", ".npy", ".npy"]


def test_a_moved_folder_is_found_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_dataset(config(data), 8, labelled=True)
    decoded = count_decoded(monkeypatch)
    load_dataset(config(data.rename(data.parent / "moved")), 8, labelled=True)
    assert decoded == []


@pytest.mark.parametrize("change", ["pixels", "time", "name", "new"])
def test_a_changed_folder_is_decoded_again(data: Path, change: str) -> None:
    before = load_dataset(config(data), 8, labelled=True)
    path = data / "a_1.png"
    if change == "pixels":
        modified = path.stat().st_mtime_ns
        save(path, noise(40, 40, seed=9))
        os.utime(path, ns=(0, modified))  # a copy that keeps times
    elif change == "time":  # as long as before, but edited
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "name":
        path.rename(data / "a_9.png")
    else:
        save(data / "z_1.png")
    decoded: list[int] = []
    after = load_dataset(config(data), 8, labelled=True, on_progress=lambda done, _: decoded.append(done))
    assert len(decoded) >= 6
    assert (len(after.images) == 5) == (change == "new")
    assert np.array_equal(before.images[0], after.images[0]) == (change != "pixels")


@pytest.mark.parametrize("damage", ["short", "no notes", "bad notes", "other shape", "not npy"])
def test_a_damaged_file_is_made_again(data: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    first = load_dataset(config(data), 8, labelled=True)
    expected = np.array(first.images)
    (file,) = (data.parent / "cache").glob("*.npy")
    notes = file.with_suffix(".json")
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no notes":
        notes.unlink()
    elif damage == "bad notes":
        notes.write_text(json.dumps([1]))
    elif damage == "other shape":
        np.save(file, np.zeros((2, 8, 8, 3), np.uint8))
    else:
        file.write_bytes(b"x")
    decoded = count_decoded(monkeypatch)
    again = load_dataset(config(data), 8, labelled=True)
    assert len(decoded) == 6
    np.testing.assert_array_equal(again.images, expected)


def test_a_killed_run_leaves_nothing_that_matters(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_dataset(config(data), 8, labelled=True, on_progress=killed)
    cache = data.parent / "cache"
    assert list(cache.iterdir()) == []
    key = module._key_and_lengths(ImageFolder(data, 8))[0]
    old, live = cache / f"{key}.old.tmp", cache / f"{key}.live.tmp"  # of a run killed outright; of one beside us
    old.write_bytes(b"half")
    live.write_bytes(b"half")
    os.utime(old, (0, time.time() - 2 * module._STALE_SECONDS))
    assert len(load_dataset(config(data), 8, labelled=True).images) == 4
    assert not old.exists()
    assert live.exists()


def test_hidden_folders_of_killed_runs_go_and_those_of_others_stay(data: Path) -> None:
    key = module._key_and_lengths(ImageFolder(data, 8))[0]
    old, live = (data.parent / "cache" / f".{key}.npy.{name}.tmp" for name in ("abcd1234", "efgh5678"))
    long_ago = time.time() - 2 * module._STALE_SECONDS
    for folder in (old, live):
        folder.mkdir(parents=True)
        (folder / f"{key}.npy").write_bytes(b"half")
        os.utime(folder, (0, long_ago))
    os.utime(old / f"{key}.npy", (0, long_ago))
    assert len(load_dataset(config(data), 8, labelled=True).images) == 4
    assert not old.exists()
    assert live.exists()  # it is long there, but its file is still written to


def test_auto_goes_by_the_share_of_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 6 * 8 * 8 * 3
    for available, processes, on_disk in [(4 * needed, 1, False), (4 * needed - 1, 1, True), (2**40, 2, True)]:
        monkeypatch.setattr(module, "available_memory", lambda n=available: n)
        dataset = load_dataset(config(data, Cache.AUTO), 8, labelled=False, processes=processes)
        assert isinstance(dataset.images, np.memmap) == on_disk


def test_of_several_processes_one_decodes_and_all_map_its_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decoded(monkeypatch)
    first, second = (load_dataset(config(data, Cache.AUTO), 8, labelled=True, processes=2) for _ in range(2))
    assert len(decoded) == 6
    assert first.images.filename == second.images.filename
    assert first.fingerprint == second.fingerprint


def test_memory_by_name_is_a_copy_for_each_process(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 6 * 8 * 8 * 3
    monkeypatch.setattr(module, "available_memory", lambda: 2 * needed)
    images = load_dataset(config(data, Cache.MEMORY), 8, labelled=False, processes=2).images
    assert not isinstance(images, np.memmap)
    with pytest.raises(ValueError, match=r"cache memory: .* use cache disk"):
        load_dataset(config(data, Cache.MEMORY), 8, labelled=False, processes=3)


def test_the_file_that_another_machine_wrote_meanwhile_stays(data: Path) -> None:
    inodes = []

    def other_machine(done: int, total: int) -> None:
        if done == total and not inodes:
            inodes.append(0)
            load_dataset(config(data), 8, labelled=True)
            (file,) = (data.parent / "cache").glob("*.npy")
            inodes[0] = file.stat().st_ino

    images = load_dataset(config(data), 8, labelled=True, on_progress=other_machine).images
    assert Path(images.filename).stat().st_ino == inodes[0]
    assert sorted(p.suffix for p in (data.parent / "cache").iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("cache", [Cache.MEMORY, Cache.DISK])
def test_names_are_those_of_the_images(data: Path, cache: Cache) -> None:
    for _ in range(2):  # the second time from the file
        assert load_dataset(config(data, cache), 8, labelled=False).names == (
            "a_1.png",
            "b_1.jpg",
            "c_2.png",
            "sub/b_2.PNG",
        )


def fingerprint(root: Path, labelled: bool = True, cache: Cache = Cache.MEMORY, **options: object) -> str:
    return load_dataset(config(root, cache, **options), 8, labelled=labelled).fingerprint


def test_the_fingerprint_of_a_copy_is_the_same(data: Path) -> None:
    before = fingerprint(data)
    assert len(before) == 64
    copy = Path(shutil.copytree(data, data.parent / "copy"))
    os.utime(copy / "a_1.png", (1, 1))
    (copy / "notes.txt").write_text("what is left out does not count")
    (copy / "a_0.png").write_bytes(b"GIF")
    save(copy / ".hidden.png")
    assert fingerprint(copy) == before
    assert fingerprint(copy, cache=Cache.DISK) == fingerprint(copy, cache=Cache.DISK) == before


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "longer", "broken", "class", "labels", "unlabelled"])
def test_the_fingerprint_sees_another_set(data: Path, change: str) -> None:
    (data / "a_0.png").unlink()
    before, labelled, options = fingerprint(data), change != "unlabelled", {}
    if change == "added":
        save(data / "a_2.png")
    elif change == "removed":
        (data / "b_1.jpg").unlink()
    elif change == "renamed":
        (data / "a_1.png").rename(data / "a_01.png")
    elif change == "longer":
        (data / "a_1.png").write_bytes((data / "a_1.png").read_bytes() + b"\0")
    elif change == "broken":  # as long as before, and the images after it move up
        (data / "a_1.png").write_bytes(bytes((data / "a_1.png").stat().st_size))
    elif change == "class":  # of an image that cannot be read, and yet it renumbers the others
        (data / "aa_1.png").write_bytes(b"")
    elif change == "labels":
        (data / "other").mkdir()
        for name, folder in (("a_1.png", "sub"), ("b_1.jpg", "sub"), ("c_1.png", "other"), ("c_2.png", "other")):
            (data / name).rename(data / folder / name)
        before, options = fingerprint(data), {"labels": "folder"}
    assert fingerprint(data, labelled, **options) != before


def test_the_fingerprint_does_not_see_the_bytes(data: Path) -> None:
    save(data / "a_1.bmp", noise(8, 8, seed=1))
    before = fingerprint(data)
    save(data / "a_1.bmp", noise(8, 8, seed=2))
    assert fingerprint(data) == before  # as its docstring says


def test_every_image_is_looked_at_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Path] = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **options: (looks.append(self), stat(self, **options))[1])
    load_dataset(config(data), 8, labelled=True)
    images = {data / name for name in ImageFolder(data, 8).names}
    assert sorted(path for path in looks if path in images) == sorted(images)


def test_the_fingerprint_of_the_first_rules(data: Path) -> None:
    """A run that began under them resumes with the same images, whatever else has become readable since."""
    names, lengths = ["a_1.png", "b_1.jpg", "c_2.png", "sub/b_2.PNG"], {}
    for name in names:
        lengths[name] = (data / name).stat().st_size
    digest = hashlib.sha256(b'["a", "b", "c"]')
    for name, label in zip(names, (0, 1, 2, 1), strict=True):
        digest.update(f"{name}\0{lengths[name]} {label}\n".encode())
    assert fingerprint(data) == digest.hexdigest()
    for name in ("d_1.tif", "e_1", "f_1.jfif"):
        save(data / name, format="TIFF")
    (data / "b_9.jpg").write_bytes((data / "b_1.jpg").read_bytes()[:-2])
    for cache in (Cache.MEMORY, Cache.DISK, Cache.DISK):
        first = load_dataset(config(data, cache), 8, labelled=True, reading=1)
        assert (first.fingerprint, first.names) == (digest.hexdigest(), tuple(names))
    assert len(load_dataset(config(data), 8, labelled=True).images) == 8


def test_the_fingerprint_sees_the_window(data: Path) -> None:
    assert fingerprint(data, window=(0, 4095)) != fingerprint(data)
    assert fingerprint(data, max_pixels=2**30) == fingerprint(data)


def test_the_file_is_made_again_for_another_decoding(data: Path) -> None:
    save(data / "c_3.png", Image.fromarray(np.full((8, 8), 4000, np.uint16)))
    with pytest.warns(UserWarning, match="1 of 1 16-bit images without a value above 4,000, which are nearly black"):
        dark = load_dataset(config(data), 8, labelled=False)
    with pytest.warns(UserWarning, match="--window 0,4095 makes 4,095 white"):
        assert np.array_equal(load_dataset(config(data), 8, labelled=False).images, dark.images)  # from the file
    bright = load_dataset(config(data, window="0,4095"), 8, labelled=False)
    assert (dark.images[3].max(), bright.images[3].min()) == (15, 249)
    assert len(load_dataset(config(data, max_pixels=240, window="0,9"), 8, labelled=False).images) == 3


def test_images_of_16_bits_that_need_no_window(data: Path) -> None:
    save(data / "c_3.png", Image.fromarray(np.full((8, 8), 4096, np.uint16)))
    assert len(load_dataset(config(data), 8, labelled=False).images) == 5  # a warning would be an error


def test_memory_that_is_too_small_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"cache memory: .* use cache disk"):
        load_dataset(config(data, Cache.MEMORY), 8, labelled=False)


def test_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < module.available_memory() <= total

    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert module.available_memory() == total


def test_decoding_keeps_few_images_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(40):
        save(tmp_path / "data" / f"{i:02}.png")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    decoded = count_decoded(monkeypatch)
    counting = module.load_described

    def slow_first(path: Path, *how: object) -> object:
        if path.name == "00.png":
            time.sleep(0.3)  # the others could all be decoded meanwhile
        return counting(path, *how)

    monkeypatch.setattr(module, "load_described", slow_first)
    ahead: list[int] = []
    load_dataset(
        config(tmp_path / "data"), 8, labelled=False, on_progress=lambda done, _: ahead.append(len(decoded) - done)
    )
    assert 1 <= max(ahead) <= 8


def test_full_disk(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"cache_dir .* has 0\.00 GiB free, it needs .* choose another"):
        load_dataset(config(data), 8, labelled=False)


def test_cache_folder_that_cannot_be_written(data: Path) -> None:
    (data.parent / "cache").write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"cache_dir .* cannot be written .* choose another folder"):
        load_dataset(config(data), 8, labelled=False)


@pytest.mark.parametrize("variable", [True, False])
def test_default_cache_folder(data: Path, monkeypatch: pytest.MonkeyPatch, variable: bool) -> None:
    home = data.parent / "home"
    monkeypatch.setenv("HOME", str(home))
    if variable:
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    load_dataset(DataConfig(data_dir=str(data), cache=Cache.DISK), 8, labelled=False)
    where = home / ("xdg" if variable else ".cache") / "fastdiff"
    assert len(list(where.glob("*.npy"))) == 1
