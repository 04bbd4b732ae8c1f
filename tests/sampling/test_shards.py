"""What a job has drawn stays on disk, whatever happens to the process."""

import errno
import inspect
import json
import os
import signal
import tempfile
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.checkpoint import Lease, NewerFormat
from fastdiff.sampling import shards as module
from fastdiff.sampling.shards import Shards, parts_of

from ..processes import script
from .test_output import full_after

SETTINGS = {"seed": 2**64 - 1, "eta": 0.5, "sampler": "ddim", "classes": [1, 2], "checkpoint": "läuft/ema.safetensors"}


def images(span: range) -> np.ndarray:
    """Of which each says its position."""
    return np.stack([np.full((2, 2, 3), i % 251, np.uint8) for i in span])


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    shards = Shards(parts_of(tmp_path / "samples.npz"))
    shards.begin(SETTINGS)
    return shards


def work(shards: Shards, text: str) -> tuple[BaseProcess, Connection]:
    """Another process, which has the same shards, and its channel."""
    beginning = f"""
import os
from pathlib import Path
import numpy as np
from fastdiff.sampling.shards import Shards
{inspect.getsource(images)}
shards = Shards(Path(folder))
"""
    return script(beginning + text, folder=str(shards.folder))


def held(shards: Shards) -> list[int]:
    """The positions that are there, each of which has its own image."""
    spans = shards.spans()
    assert all(before.stop <= after.start for before, after in pairwise(spans))
    for span in spans:
        assert np.array_equal(shards.read(span), images(span))
    return [i for span in spans for i in span]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_is_beside_the_output() -> None:
    assert parts_of(Path("runs/a/samples.npz")) == Path("runs/a/samples.npz.parts")


def test_a_job_in_several_goes(shards: Shards) -> None:
    assert shards.missing(70).tolist() == list(range(70))
    shards.add(16, images(range(16, 32)))
    shards.add(64, images(range(64, 70)))
    again = Shards(shards.folder)
    assert again.settings() == SETTINGS
    assert names(again.folder) == {"job.json", "000016-000032.npz", "000064-000070.npz"}
    assert again.spans() == [range(16, 32), range(64, 70)]
    assert again.missing(70).tolist() == [*range(16), *range(32, 64)]
    assert again.missing(20).tolist() == list(range(16))
    for span in (range(16), range(32, 57), range(57, 64)):
        again.add(span.start, images(span))
    assert again.missing(70).tolist() == []
    assert held(again) == list(range(70))
    assert again.read(range(57, 64)).flags.writeable
    again.drop(range(57, 64))
    assert again.missing(70).tolist() == list(range(57, 64))


def test_positions_of_more_than_six_digits(shards: Shards) -> None:
    for span in (range(999_998, 1_000_001), range(12_345_678, 12_345_679)):
        shards.add(span.start, images(span))
    assert names(shards.folder) == {"job.json", "999998-1000001.npz", "12345678-12345679.npz"}
    assert len(held(shards)) == 4


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)).map(lambda at: range(at[0], sum(at))), max_size=6),
    st.integers(1, 12),
)
def test_spans_that_overlap_count_once(there: list[range], total: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder))
        for span in there:
            shards.add(span.start, images(span))
        held(shards)
        for position in shards.missing(total).tolist():
            shards.add(position, images(range(position, position + 1)))
        assert shards.missing(total).tolist() == []
        covered = held(shards)
        assert covered[:total] == list(range(total))


def test_files_that_are_none_of_ours(shards: Shards, tmp_path: Path) -> None:
    shards.add(0, images(range(4)))
    others = (
        "a.npz",
        "4-8.npz",
        "000008-000004.npz",
        "000004-000004.npz",
        "0000004-0000008.npz",
        "000004-000008.npz.bak",
    )
    for name in others:
        (shards.folder / name).write_text("mine")
    (shards.folder / "000004-000008.npz").mkdir()
    (shards.folder / "000008-000012.npz").symlink_to(tmp_path / "elsewhere")
    (shards.folder / "٠٠٠٠١٢-٠٠٠٠١٦.npz").write_text("mine")
    theirs = names(shards.folder) - {"job.json", "000000-000004.npz"}
    assert shards.spans() == [range(4)]
    shards.remove()
    assert names(shards.folder) == theirs
    assert shards.settings() is None
    assert shards.spans() == []


def test_remove(shards: Shards, tmp_path: Path) -> None:
    with Lease(shards.folder, "job 7", "--out"):
        shards.add(0, images(range(4)))
        shards.add(2, images(range(2, 4)))  # one that does not count
        (shards.folder / ".000004-000008.npz.abcdefgh.tmp").mkdir()
        shards.remove()
        shards.remove()
    assert not list(tmp_path.iterdir())


def test_no_job_is_there_before_it_is_begun(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "new" / "a.npz.parts")
    assert shards.settings() is None
    assert shards.spans() == []
    assert shards.missing(3).tolist() == [0, 1, 2]
    shards.clean()
    assert not list(tmp_path.iterdir())
    shards.begin({})
    assert shards.settings() == {}


def test_a_job_begun_anew_has_none_of_the_images_before(shards: Shards) -> None:
    shards.add(0, images(range(4)))
    shards.begin({"seed": 1})
    assert shards.settings() == {"seed": 1}
    assert names(shards.folder) == {"job.json"}


def test_a_kill_while_a_job_is_begun_anew(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment are the images there with the settings of another job."""
    shards.add(0, images(range(4)))
    shards.add(4, images(range(4, 8)))
    real, seen = Path.unlink, []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        seen.append((shards.settings(), len(shards.spans())))

    monkeypatch.setattr(Path, "unlink", unlink)
    shards.begin({"seed": 1})
    assert seen == [(None, 2), (None, 1), (None, 0)]


# Damage


MANIFEST = '{"format": "fastdiff-samples-1", "settings": {}}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", "null", '"fastdiff-samples-1"', "\udcff", "[" * 100_000, "{}", MANIFEST[:-1]),
        *(MANIFEST.replace("{}", value) for value in ("[]", "null", '"a"')),
        *(MANIFEST.replace('"fastdiff-samples-1"', value) for value in ("1", "null", '"fastdiff-1"', "{}")),
        MANIFEST.replace("samples-1", "samples-0"),
    ],
)
def test_a_damaged_manifest(shards: Shards, text: str) -> None:
    (shards.folder / "job.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"job\.json is damaged: use --overwrite") as caught:
        shards.settings()
    assert caught.type is ValueError
    shards.begin(SETTINGS)
    assert shards.settings() == SETTINGS


@pytest.mark.parametrize("manifest", [{"settings": {}}, {}])
@pytest.mark.parametrize("version", [2, 10, 123456])
def test_a_newer_manifest(shards: Shards, manifest: dict[str, Any], version: int) -> None:
    text = json.dumps(manifest | {"format": f"fastdiff-samples-{version}"})
    (shards.folder / "job.json").write_text(text)
    with pytest.raises(NewerFormat, match=r"job\.json was made by a newer fastdiff: upgrade .* --overwrite"):
        shards.settings()


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, bytes]:
    shards = Shards(tmp_path_factory.mktemp("shards"))
    shards.add(3, images(range(3, 8)))
    return shards, (shards.folder / "000003-000008.npz").read_bytes()


def read(shards: Shards, content: bytes) -> np.ndarray | None:
    """The images of positions 3 to 7, or None where the file is refused as it should be."""
    (shards.folder / "000003-000008.npz").write_bytes(content)
    try:
        return shards.read(range(3, 8))
    except ValueError as error:
        said = str(error)
    says = "000003-000008.npz is damaged and counts as missing: the same command draws its images again"
    assert said == f"{shards.folder}/{says}"
    return None


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_damaged_bytes(one_shard: tuple[Shards, bytes], data: st.DataObject) -> None:
    shards, content = one_shard
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = read(shards, bytes(damaged))
    assert found is None or np.array_equal(found, images(range(3, 8)))


def test_every_bit_of_the_pixels_counts(one_shard: tuple[Shards, bytes]) -> None:
    shards, content = one_shard
    pixels = images(range(3, 8)).tobytes()
    first = content.index(pixels)
    for at in range(first, first + len(pixels)):
        assert read(shards, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]) is None
    assert np.array_equal(read(shards, content), images(range(3, 8)))


def test_files_cut_short_or_of_something_else(one_shard: tuple[Shards, bytes]) -> None:
    shards, content = one_shard
    for size in range(len(content)):
        assert read(shards, content[:size]) is None
    for array in (images(range(4)), images(range(3, 8)).astype(np.int16), np.zeros((5, 2, 2), np.uint8)):
        np.savez(shards.folder / "000003-000008.npz", array)
        assert read(shards, (shards.folder / "000003-000008.npz").read_bytes()) is None


def test_a_shard_that_is_gone_or_that_the_disk_does_not_give_back(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"000000-000004\.npz is damaged"):
        shards.read(range(4))

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shards.add(0, images(range(4)))
    monkeypatch.setattr(module, "read_samples", fail)
    with pytest.raises(ValueError, match=r"000000-000004\.npz is damaged"):
        shards.read(range(4))


# Processes that die, disks that are full


def test_a_disk_that_is_full_at_any_byte(shards: Shards) -> None:
    shards.add(0, images(range(4)))
    size = (shards.folder / "000000-000004.npz").stat().st_size
    for most in range(0, size, 7):
        with full_after(most), pytest.raises(OSError, match="cannot be written") as caught:
            shards.add(4, images(range(4, 8)))
        assert str(caught.value) == (
            f"{shards.folder}/000004-000008.npz cannot be written (File too large): the finished images stay, and the "
            "same command resumes the job"
        )
        assert names(shards.folder) == {"job.json", "000000-000004.npz"}
        assert held(shards) == list(range(4))
    with full_after(size):
        shards.add(4, images(range(4, 8)))
    assert held(shards) == list(range(8))


@pytest.mark.parametrize("call", ["mkdir", "fsync", "chmod", "replace"])
def test_a_disk_that_is_full_at_any_other_call(shards: Shards, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shards.add(0, images(range(4)))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        says = (
            r"000004-000008\.npz cannot be written \(No space left on device\): the finished images stay, and the same"
        )
        with pytest.raises(OSError, match=says):
            shards.add(4, images(range(4, 8)))
    assert names(shards.folder) == {"job.json", "000000-000004.npz"}
    assert held(shards) == list(range(4))


def test_a_manifest_that_cannot_be_written(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "a.npz.parts")
    with (
        full_after(20),
        pytest.raises(OSError, match=r"a\.npz\.parts cannot be written to \(File too large\): make room"),
    ):
        shards.begin(SETTINGS)
    assert shards.settings() is None
    assert not names(shards.folder)
    shards.begin(SETTINGS)
    assert shards.settings() == SETTINGS


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_kill_in_the_middle_of_writing(shards: Shards, tmp_path: Path, at: int) -> None:
    """Each file is flushed, then its folder: killed at the first of the two it is absent, at the second whole."""
    text = f"""
real, calls = os.fsync, 0
def fsync(handle):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), {signal.SIGKILL.value})
    real(handle)
os.fsync = fsync
for start in (0, 4, 8):
    shards.add(start, images(range(start, start + 4)))
"""
    process, _ = work(shards, text)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert held(shards) == list(range(4 * (at // 2)))
    left = {path.name for path in shards.folder.glob(".*.tmp")}
    assert len(left) == 1
    output = tmp_path / ".samples.npz.12345678.tmp"  # as a kill would leave it while the output is put together
    others = [
        tmp_path / name for name in (".samples.npz2.12345678.tmp", ".a.samples.npz.12345678.tmp", ".samples.npz.tmp")
    ]
    for folder in (output, *others):
        folder.mkdir()
    shards.clean()
    assert names(shards.folder) == {"job.json"} | {f"{i:06d}-{i + 4:06d}.npz" for i in range(0, 4 * (at // 2), 4)}
    assert not output.exists()
    assert all(folder.exists() for folder in others)
    shards.add(int(shards.missing(12)[0]), images(range(4 * (at // 2), 12)))
    assert held(shards) == list(range(12))


def test_a_kill_at_any_moment(shards: Shards) -> None:
    """What a process has said to be finished is there."""
    total = 0
    for life in range(3):
        text = """
for start in range(int(shards.missing(100_000)[0]), 100_000, 3):
    shards.add(start, images(range(start, start + 3)))
    channel.send(start + 3)
"""
        process, channel = work(shards, text)
        for _ in range(5 + 20 * life):
            said = channel.recv()
        process.kill()
        process.join()
        before, total = total, len(held(shards))
        assert total >= said >= before + 15
        assert held(shards) == list(range(total))


def test_two_processes_add_at_once(shards: Shards) -> None:
    text = """
channel.send("ready")
for start in range(channel.recv(), 300, 10):
    shards.add(start, images(range(start, start + 5)))
"""
    both = [work(shards, text) for _ in range(2)]
    for _, channel in both:
        assert channel.recv() == "ready"
    for (_, channel), first in zip(both, (0, 5), strict=True):
        channel.send(first)
    for process, _ in both:
        process.join()
        assert process.exitcode == 0
    assert held(shards) == list(range(300))
    assert len(names(shards.folder)) == 61


# Folders that cannot be used


def test_folders_that_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "broken"):
        with pytest.raises(
            ValueError, match=rf"{name} is not a folder for the unfinished images: remove it, or .*--out"
        ):
            Shards(tmp_path / name)
    with pytest.raises(OSError, match=r"parts cannot be written to \((Not a directory|File exists)\): .*--out"):
        Shards(tmp_path / "file" / "a.npz.parts").begin({})


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)  # root may write everywhere
    with pytest.raises(
        ValueError, match=r"folder is not a folder that you may write to: make it writable, or name another --out"
    ):
        Shards(tmp_path / "folder")


def test_a_place_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    shards = Shards(tmp_path / "a.npz.parts")
    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(OSError, match=r"a\.npz\.parts cannot be written to \(Read-only file system\): .*--out"):
        shards.begin({})
