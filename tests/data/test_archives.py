"""Archives from anywhere: read from end to end or refused in a line, and nothing written where it should not be."""

import os
import stat
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.data.archives import reading, whole
from fastdiff.data.imagenet import prepare_imagenet

from .archive_support import UNSAFE, encrypted, found_below, png, tar, tar_bytes, zipped

GOOD = {"n1/a_1.png": png(1), "n2/b_1.png": png(2)}


def refused(tmp_path: Path, archive: Path) -> str:
    """The one line that an archive is refused with; nothing is left but the archive itself."""
    before = found_below(tmp_path)
    with pytest.raises(ValueError, match=str(archive)) as caught:
        prepare_imagenet(archive, tmp_path / "out")
    assert found_below(tmp_path) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_members_in_their_order(tmp_path: Path, kind: str) -> None:
    members = {"./b/1.png": b"12", "a.txt": b"", "b/c/2.png": b"3"}
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        zipped(path, {**members, "b/": b""})
    else:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        tar(path, members, "w:gz" if kind == "tar.gz" else "w", extra=folder)
    seen, progress = {}, []
    with reading(path, lambda *at: progress.append(at)) as files:
        for member in files:
            with member.open() as file:
                seen[member.name] = (member.size, file.read())
    assert seen == {"b/1.png": (2, b"12"), "a.txt": (0, b""), "b/c/2.png": (1, b"3")}
    assert [total for _, total in progress] == [path.stat().st_size] * 3
    assert all(0 <= done <= total for done, total in progress)


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("kind", ["tar", "zip", "nested"])
def test_names_that_lead_out_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    members = {**GOOD, name: png()}
    if kind == "nested":
        path = tar(tmp_path / "x.tar", {"n3.tar": tar_bytes(members)})
    else:
        path = (tar if kind == "tar" else zipped)(tmp_path / f"x.{kind}", members)
    assert "leads out of its folder" in refused(tmp_path, path)


def test_a_tar_whose_own_name_leads_out(tmp_path: Path) -> None:
    assert "leads out" in refused(tmp_path, tar(tmp_path / "x.tar", {"../n3.tar": tar_bytes(GOOD)}))
    assert "leads out" in refused(tmp_path, tar(tmp_path / "y.tar", {"...tar": tar_bytes(GOOD)}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes) -> None:
    extra = tarfile.TarInfo("n1/link.png")
    extra.type, extra.linkname = kind, "/etc/passwd"
    assert "n1/link.png, a link or a device" in refused(tmp_path, tar(tmp_path / "x.tar", GOOD, extra=extra))


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip(tmp_path: Path, mode: int) -> None:
    path = zipped(tmp_path / "x.zip", {"link.png": b"/etc/passwd"}, mode=mode | 0o777)
    assert "link.png, a link or a device" in refused(tmp_path, path)


def test_an_encrypted_zip(tmp_path: Path) -> None:
    assert "encrypted" in refused(tmp_path, encrypted(zipped(tmp_path / "x.zip", GOOD)))


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_that_are_cut_short_anywhere(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    zipped(path, GOOD) if kind == "zip" else tar(path, GOOD, "w:gz" if kind == "tar.gz" else "w")
    content = path.read_bytes()
    end = content.rstrip(b"\0")  # of a tar the rest is padding
    for length in [0, 1, 100, 512, 1024, 1300, len(end) // 2, len(end) - 1]:
        if length < len(end):
            path.write_bytes(content[:length])
            assert "damaged, incomplete or no tar" in refused(tmp_path, path)


def test_a_tar_without_an_end_or_with_rubbish_in_it(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", GOOD)
    content = path.read_bytes()
    second = content.index(b"n2/b_1.png")
    path.write_bytes(content[:second])  # exactly between two members
    assert "it has no end" in refused(tmp_path, path)
    path.write_bytes(content[:second] + b"rubbish!" * 64 + content[second + 512 :])
    assert "it has no end" in refused(tmp_path, path)


def test_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(b"n1/a_1.png") + 60] ^= 255
    path.write_bytes(content)
    assert "damaged" in refused(tmp_path, path)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello" * 1000)
    assert "no tar, tar.gz or zip" in refused(tmp_path, tmp_path / "x.tar")
    with pytest.raises(OSError, match=r"nowhere\.tar"):
        prepare_imagenet(tmp_path / "nowhere.tar", tmp_path / "out")
    assert found_below(tmp_path) == {"x.tar"}


def test_a_name_that_never_ends(tmp_path: Path) -> None:
    """A long name is read into memory at once, and a gigabyte of one packs into a megabyte."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**40
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert "a name of" in refused(tmp_path, tmp_path / "x.tar")


def test_the_same_name_twice(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a_1.png": png(), "./a_1.png": png()})
    with pytest.raises(ValueError, match=r"holds a_1\.png twice"):
        prepare_imagenet(path, tmp_path / "out")
    assert found_below(tmp_path) == {"x.tar"}


def test_large_members_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff.data.imagenet.MAX_BYTES", 10_000)
    path = zipped(tmp_path / "x.zip", {"a_1.png": png(), "bomb.png": bytes(10_001)})
    found = prepare_imagenet(path, tmp_path / "out")
    assert (found.images, found.left_out) == (1, {"over 10,000 bytes": 1})
    assert found_below(tmp_path / "out") == {"a_1.png"}


def test_members_are_streamed(tmp_path: Path) -> None:
    content = os.urandom(2**20) * 24
    path = tar(tmp_path / "x.tar", {"a_1.png": content})
    tracemalloc.start()
    try:
        prepare_imagenet(path, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out/a_1.png").read_bytes() == content
    assert peak < 2**23


def make(kind: str) -> Callable[[Path], object]:
    return {"file": lambda path: path.write_text("new"), "folder": lambda path: (path / "sub").mkdir(parents=True)}[
        kind
    ]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_whole(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "deep/er/out"
    with whole(out) as unfinished:
        make(kind)(unfinished)
        make("file")(unfinished.parent / "scratch")
        assert not out.exists()
    assert out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.is_dir() == (kind == "folder")
    assert stat.S_IMODE(out.stat().st_mode) & 0o055 == (0o055 if kind == "folder" else 0o044)
    if kind == "file":
        with pytest.raises(ValueError, match="out exists already: name another"), whole(out):
            pytest.fail("it is there")


def test_an_empty_folder_is_replaced_and_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole(tmp_path / "out") as folder:
        make("folder")(folder)
    assert found_below(tmp_path) == {"out", "out/sub"}
    with pytest.raises(ValueError, match="out exists already"), whole(tmp_path / "out"):
        pytest.fail("it is not empty")


def test_what_a_killed_run_left_is_named(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd1234.tmp").mkdir()
    with pytest.warns(UserWarning, match=r"\.out\.abcd1234\.tmp may be left"), whole(tmp_path / "out") as folder:
        folder.mkdir()
    assert found_below(tmp_path) == {"out", ".out.abcd1234.tmp"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whole_or_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def attempt() -> None:
        with whole(tmp_path / "out") as folder:
            make("folder")(folder)
            raise error

    with pytest.raises(error):
        attempt()
    assert found_below(tmp_path) == set()
