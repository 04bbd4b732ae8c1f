"""LSUN: the folder and the zip give the same files, numbered by key, cut with a box filter."""

import io
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from fastdiff.data import load
from fastdiff.data.lsun import prepare_lsun

from ..support import refusal
from .archive_support import found_below
from .support import noise

SIZES = [(40, 20), (16, 33), (16, 16), (9, 12), (400, 16)]


def encoded(i: int, kind: str = "WEBP") -> bytes:
    file = io.BytesIO()
    noise(*SIZES[i], seed=i).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Five images in the order of their keys, one of them broken, in bedroom_train_lmdb."""
    values = [encoded(0), encoded(1), b"RIFF broken", encoded(3, "PNG"), encoded(4)]
    folder = tmp_path / "bedroom_train_lmdb"
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for i in (3, 1, 4, 0, 2):
            transaction.put(f"{i}abc".encode(), values[i])
    (folder / "lock.mdb").unlink(missing_ok=True)
    return folder


def expected(i: int, size: int) -> np.ndarray:
    """By another way than the code's: shorter side to size, centre."""
    image = noise(*SIZES[i], seed=i)
    scale = size / min(image.size)
    resized = np.asarray(image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BOX))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("zipped", [False, True])
def test_names_and_pixels(tmp_path: Path, database: Path, zipped: bool) -> None:
    source = database
    if zipped:
        source = tmp_path / "bedroom.zip"
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("bedroom_train_lmdb/lock.mdb", b"x" * 10)
            archive.write(database / "data.mdb", "bedroom_train_lmdb/data.mdb")
    before = found_below(tmp_path)
    progress: list[tuple[int, int]] = []
    assert prepare_lsun(source, tmp_path / "out", 8, "room", on_progress=lambda *at: progress.append(at)) == (4, 1)
    assert progress == [(i, 5) for i in range(1, 6)]
    assert found_below(tmp_path) - before == {"out", *(f"out/room_000000{i}.png" for i in (0, 1, 3, 4))}
    for i in (0, 1, 3):
        np.testing.assert_array_equal(load(tmp_path / f"out/room_000000{i}.png", 8), expected(i, 8))
    near = load(tmp_path / "out/room_0000004.png", 8).astype(int) - expected(4, 8)
    assert abs(near).max() <= 1  # 25 times as wide as high: only the middle is resized


def test_limit(tmp_path: Path, database: Path) -> None:
    assert prepare_lsun(database, tmp_path / "out", 8, limit=2) == (2, 0)
    assert found_below(tmp_path / "out") == {"bedroom_0000000.png", "bedroom_0000001.png"}
    assert prepare_lsun(database, tmp_path / "all", 8, limit=100) == (4, 1)


def test_nothing_readable(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "db"), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"a", b"text")
    with pytest.raises(ValueError, match="holds no readable image among 1"):
        prepare_lsun(tmp_path / "db", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_sources(tmp_path: Path, database: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no data\.mdb: give a folder like"):
        prepare_lsun(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty/data.mdb").write_bytes(b"x" * 10_000)
    with pytest.raises(ValueError, match="empty is damaged or not an LMDB database"):
        prepare_lsun(tmp_path / "empty", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("lock.mdb", b"x")
    with pytest.raises(ValueError, match=r"x\.zip holds no data\.mdb"):
        prepare_lsun(tmp_path / "x.zip", tmp_path / "out")
    for prefix in ("", "../x", "a\\b", "..", ".x", "a\0"):
        with pytest.raises(ValueError, match="prefix must be"):
            prepare_lsun(database, tmp_path / "out", prefix=prefix)
    with pytest.raises(ValueError, match="image_size must be positive"):
        prepare_lsun(database, tmp_path / "out", 0)
    assert found_below(tmp_path) == {"empty", "empty/data.mdb", "x.zip", database.name, f"{database.name}/data.mdb"}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_database_that_is_cut_short(tmp_path: Path, database: Path, zipped: bool) -> None:
    pages = (database / "data.mdb").read_bytes()
    (database / "data.mdb").write_bytes(pages[: len(pages) // 2])
    source = database
    if zipped:
        source = tmp_path / "x.zip"
        with zipfile.ZipFile(source, "w") as archive:
            archive.write(database / "data.mdb", "db/data.mdb")
    said = r"is damaged or not an LMDB database \(it has [\d,]+ of [\d,]+ bytes\): copy it again"
    refusal(lambda: prepare_lsun(source, tmp_path / "out", 8), said)
    assert not (tmp_path / "out").exists()


def test_a_database_that_is_damaged_further_on(tmp_path: Path, database: Path) -> None:
    """LMDB's own library reads what is mapped and not there, which ends the process at once."""
    content = bytearray((database / "data.mdb").read_bytes())
    at = content.index(b"4abc") - 8
    content[at : at + 4] = (2**31 - 1).to_bytes(4, "little")  # the size of the last value
    (database / "data.mdb").write_bytes(content)
    refusal(
        lambda: prepare_lsun(database, tmp_path / "out", 8), r"is damaged or not an LMDB database \(.*\): copy it again"
    )
    assert prepare_lsun(database, tmp_path / "out", 8, limit=2) == (2, 0)


def test_stopped_in_the_middle(tmp_path: Path, database: Path) -> None:
    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    before = found_below(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare_lsun(database, tmp_path / "out", on_progress=stop)
    assert found_below(tmp_path) == before
