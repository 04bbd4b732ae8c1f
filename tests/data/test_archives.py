"""Archives from anywhere: read from end to end or refused in a line, and nothing written where it should not be."""

import contextlib
import gc
import gzip
import os
import resource
import shutil
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.config import DataConfig
from fastdiff.data import ImageFolder
from fastdiff.data.archives import ArchiveError, reading
from fastdiff.data.cifar10 import prepare_cifar10
from fastdiff.data.imagenet import prepare_imagenet
from fastdiff.data.loading import load_dataset
from fastdiff.data.packing import pack_npz, pack_zip

from ..support import refusal
from .archive_support import UNSAFE, encrypted, found_below, png, tar, tar_bytes, zipped
from .support import noise

GOOD = {"n1/a_1.png": png(1), "n2/b_1.png": png(2)}


def refused(tmp_path: Path, archive: Path) -> str:
    """The one line that an archive is refused with; nothing is left but the archive itself."""
    before = found_below(tmp_path)
    message = refusal(lambda: prepare_imagenet(archive, tmp_path / "out"), str(archive))
    assert found_below(tmp_path) == before
    return message


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


WINDOWS = {"photos\\n1\\": b"", "photos\\n1\\a.png": png(1), "photos\\n2\\b.png": png(2)}
"""As some Windows programs name the files of a zip."""


def test_backslashes_end_the_folders_of_a_zip_without_slashes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", WINDOWS)
    found = prepare_imagenet(path, tmp_path / "out")
    assert found.images == 2
    assert {"photos/n1/a.png", "photos/n2/b.png"} <= found_below(tmp_path / "out")
    same = zipped(tmp_path / "y.zip", {name.replace("\\", "/"): content for name, content in WINDOWS.items()})
    folders = [ImageFolder(place, 8, labels="auto") for place in (path, same)]
    for folder in folders:
        assert folder.names == ["photos/n1/a.png", "photos/n2/b.png"]
        assert folder.class_names == ("n1", "n2")
        assert len([folder[i] for i in range(2)]) == 2
    prints = [load_dataset(DataConfig(data_dir=str(p)), 8, labelled=False).fingerprint for p in (path, same)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("name", ["..\\a.png", "a\\..\\..\\b.png", "\\a.png", "\\\\host\\a.png", "C:\\a.png"])
def test_names_with_backslashes_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "x.zip", {**WINDOWS, name: png()})
    assert "leads out of its folder" in refused(tmp_path, path)
    refusal(lambda: ImageFolder(path, 8), "leads out of its folder")


def test_backslashes_beside_slashes_are_refused_as_what_they_are(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {**WINDOWS, "photos/c.png": png()})
    said = "a backslash is part of a name on some systems and ends a folder on others: pack it again with slashes"
    assert said in refused(tmp_path, path)
    refusal(lambda: ImageFolder(path, 8), said)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a\\b.png").write_bytes(png())
    refusal(lambda: pack_zip(tmp_path / "images", tmp_path / "y.zip"), "has a backslash in its name: rename it")


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
            assert "damaged, incomplete or not a tar" in refused(tmp_path, path)


def test_a_tar_without_an_end_or_with_rubbish_in_it(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", GOOD)
    content = path.read_bytes()
    second = content.index(b"n2/b_1.png")
    path.write_bytes(content[:second])  # exactly between two members
    assert "it has no end marker" in refused(tmp_path, path)
    path.write_bytes(content[:second] + b"rubbish!" * 64 + content[second + 512 :])
    assert "it has no end marker" in refused(tmp_path, path)


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "nested"])
def test_a_tar_with_more_behind_its_end(tmp_path: Path, kind: str) -> None:
    """As cat a.tar b.tar makes it: the second one would be lost without a word."""
    joined = tar_bytes(GOOD) + tar_bytes({"n3/c_3.png": png(3)})
    path = tmp_path / ("x.tar" if kind == "nested" else f"x.{kind}")
    if kind == "nested":
        tar(path, {"n01440764.tar": joined, **GOOD})
    else:
        path.write_bytes(joined if kind == "tar" else gzip.compress(joined))
    assert "holds a tar with more behind its end: copy it again, or unpack it (tar -i)" in refused(tmp_path, path)
    path.write_bytes(tar_bytes(GOOD) + bytes(2**21))  # the padding of a tape's blocks
    assert prepare_imagenet(path, tmp_path / "out").images == 2


def test_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", GOOD)
    content = bytearray(path.read_bytes())
    content[content.index(b"n1/a_1.png") + 60] ^= 255
    path.write_bytes(content)
    assert "damaged" in refused(tmp_path, path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_anywhere_in_a_zip(tmp_path: Path, method: int) -> None:
    """Whatever the damage makes zipfile and the three libraries under it raise, it is one line with the file in it."""
    path = zipped(tmp_path / "x.zip", GOOD, method=method)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xD5]) + whole[at + 1 :])
        with contextlib.suppress(ValueError), reading(path) as members:
            for member in members:
                with contextlib.suppress(ArchiveError):
                    member.read(10**6)
    damaged = bytearray(whole)
    start = whole.index(b"n2/b_1.png") + 18
    damaged[start : start + 12] = bytes(byte ^ 0x5A for byte in damaged[start : start + 12])
    path.write_bytes(damaged)
    assert "damaged, incomplete or not a tar" in refused(tmp_path, path)


def test_a_zip_with_names_that_are_no_text(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"\N{LATIN SMALL LETTER E WITH ACUTE}_1.png": png()})
    path.write_bytes(path.read_bytes().replace("\N{LATIN SMALL LETTER E WITH ACUTE}".encode(), b"\xff\xfe"))
    assert "damaged" in refused(tmp_path, path)


@pytest.mark.parametrize("damage", [b"n2/\0_1.png", b"n2/b_\0.png", b"n2/b_1.pn/"])
def test_a_name_in_a_zip_that_hides_its_file(tmp_path: Path, damage: bytes) -> None:
    """zipfile cuts a name at a zero, and what is left may look like a folder."""
    path = zipped(tmp_path / "x.zip", GOOD)
    path.write_bytes(path.read_bytes().replace(b"n2/b_1.png", damage))
    said = "a damaged name: copy it again" if b"\0" in damage else "a folder with content: copy it again"
    assert said in refused(tmp_path, path)
    refusal(lambda: ImageFolder(path, 8), said)


@pytest.mark.parametrize("comment", [b"", b"x" * 300])
def test_an_entry_of_a_zip_that_swallows_the_next(tmp_path: Path, comment: bytes) -> None:
    """By the length of its comment; zipfile does not count the entries that are left."""
    path = zipped(tmp_path / "x.zip", {**GOOD, "n3/c_3.png": png(3)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    assert len(ImageFolder(path, 8)) == 3
    content = bytearray(path.read_bytes())
    path.write_bytes(content + b"\r\n")  # what some transfers append
    assert len(ImageFolder(path, 8)) == 3
    content[content.index(b"PK\1\2") + 33] = 1  # 256 bytes
    path.write_bytes(content)
    assert "is damaged: 1 of its 3 files are found; copy it again" in refused(tmp_path, path)
    refusal(lambda: ImageFolder(path, 8), "is damaged: 1 of its 3 files")


@pytest.mark.slow
def test_a_zip_of_more_files_than_fit_in_its_end(tmp_path: Path) -> None:
    """With the record of ZIP64, and without it, as older programs write such zips."""
    names = [f"{i}.txt" for i in range(2**16 + 3)]
    path = zipped(tmp_path / "x.zip", {**dict.fromkeys(names, b""), "a_1.png": png()})
    assert len(ImageFolder(path, 8)) == 1
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    record = bytearray(content[end:])
    record[8:12] = (4).to_bytes(2, "little") * 2
    path.write_bytes(content[:end] + record)
    assert len(ImageFolder(path, 8)) == 1


@pytest.mark.parametrize("name", ["", ".", "./"])
def test_a_file_without_a_name(tmp_path: Path, name: str) -> None:
    """Of a zip zipfile fails to say whether it is a folder."""
    assert "a file without a name" in refused(tmp_path, tar(tmp_path / "x.tar", {**GOOD, name: png()}))
    if not name.endswith("/"):
        path = zipped(tmp_path / "x.zip", {**GOOD, name: png()})
        assert "a file without a name" in refused(tmp_path, path)
        with pytest.raises(ValueError, match=r"x\.zip holds a file without a name"):
            ImageFolder(path, 8)


@pytest.mark.parametrize(
    "headers",
    [
        {"path": "y\0z.png"},
        {"path": "y" * 300 + ".png"},
        {"path": "/".join(["y" * 100] * 60) + ".png"},
        {"GNU.sparse.map": "a,b", "GNU.sparse.size": "10"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "q.png", "GNU.sparse.realsize": "x"},
    ],
)
def test_odd_headers(tmp_path: Path, headers: dict[str, str]) -> None:
    extra = tarfile.TarInfo("x.png")
    extra.pax_headers = headers
    message = refused(tmp_path, tar(tmp_path / "x.tar", GOOD, extra=extra))
    assert "damaged" in message or "a name that is invalid here" in message
    assert ".tmp" not in message


@pytest.mark.parametrize("names", [("a.png", "a.png/b.png"), ("a.png/b.png", "a.png"), ("a.png", "a.png/b/c.png")])
def test_a_name_of_a_file_and_a_folder(tmp_path: Path, names: tuple[str, str]) -> None:
    path = tar(tmp_path / "x.tar", dict.fromkeys(names, png()))
    assert f"holds {names[1]} as a file and as a folder" in refused(tmp_path, path)


@pytest.mark.parametrize("name", ["b.png", "b.txt", "b.tar"])
def test_a_size_below_nothing(tmp_path: Path, name: str) -> None:
    """The next header would be this one, for ever."""
    info = tarfile.TarInfo(name)
    info.size = -512
    path = tar(tmp_path / "x.tar", GOOD)
    raw = path.read_bytes().rstrip(b"\0")
    raw += bytes(-len(raw) % 512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    path.write_bytes(raw)
    assert "a negative size" in refused(tmp_path, path)


def test_a_negative_size_in_another_header(tmp_path: Path) -> None:
    extra = tarfile.TarInfo("b.txt")
    extra.pax_headers = {"size": "-1024"}
    assert "a negative size" in refused(tmp_path, tar(tmp_path / "x.tar", GOOD, extra=extra))
    info = tarfile.TarInfo("b")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, -512  # all that follows, as a name
    (tmp_path / "y.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert "a name of -512 bytes" in refused(tmp_path, tmp_path / "y.tar")


def test_sparse_files(tmp_path: Path) -> None:
    """Three KB could become as many GiB as they like."""
    extra = tarfile.TarInfo("s.png")
    extra.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**30)}
    assert "s.png, a sparse file" in refused(tmp_path, tar(tmp_path / "x.tar", GOOD, extra=extra))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_grows_as_no_image_does(tmp_path: Path, method: int) -> None:
    """An honest one of zeros, but for deflate, which cannot, and so lies."""
    path = zipped(tmp_path / "x.zip", {"a_1.png": png(), "b.png": bytes(2**23)}, method=method)
    if method == zipfile.ZIP_DEFLATED:
        assert prepare_imagenet(path, tmp_path / "out").images == 2
        shutil.rmtree(tmp_path / "out")
        raw = bytearray(path.read_bytes())
        at = raw.rindex(b"PK\1\2") + 24
        raw[at : at + 4] = (2**30).to_bytes(4, "little")
        path.write_bytes(raw)
    assert "b.png claims to be larger than" in refused(tmp_path, path)


def test_members_that_overlap(tmp_path: Path) -> None:
    """One megabyte, found under a thousand names."""
    path = zipped(tmp_path / "x.zip", {"a.png": os.urandom(5000), "b.png": b""}, method=zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    first, second = raw.index(b"PK\1\2"), raw.rindex(b"PK\1\2")
    raw[second + 16 : second + 28] = raw[first + 16 : first + 28]  # checksum and lengths
    path.write_bytes(raw)
    assert "(its files overlap)" in refused(tmp_path, path)


def test_what_the_user_of_an_archive_raises_is_its_own(tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        raise RuntimeError("the display")

    with pytest.raises(RuntimeError, match="the display"):
        prepare_imagenet(tar(tmp_path / "x.tar", GOOD), tmp_path / "out", on_progress=fail)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"hello" * 1000)
    assert "not a tar, tar.gz or zip" in refused(tmp_path, tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"nowhere\.tar does not exist: give the archive"):
        prepare_imagenet(tmp_path / "nowhere.tar", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a file: give the archive"):
        prepare_imagenet(tmp_path / "pipe", tmp_path / "out")
    assert found_below(tmp_path) == {"x.tar", "pipe"}


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


@pytest.mark.parametrize("kind", ["imagenet", "cifar10", "zip", "npz", "smaller"])
def test_a_full_disk(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the length of files stands in for it: the error has no file in it either."""
    monkeypatch.setattr("fastdiff.data.cifar10._ROWS", 2)
    images = tmp_path / "images"
    images.mkdir()
    noise(200, 200).save(images / "a_1.png")
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (images / f"{name}.bin").write_bytes(b"\1" + os.urandom(3072) + b"\2" + os.urandom(3072))
    path = tar(tmp_path / "x.tar", {"a_1.png": (images / "a_1.png").read_bytes()})
    out = tmp_path / f"out.{kind}"
    make_it: dict[str, Callable[[], object]] = {
        "imagenet": lambda: prepare_imagenet(path, out),
        "cifar10": lambda: prepare_cifar10(images, out),
        "zip": lambda: pack_zip(images, out),
        "npz": lambda: pack_npz(DataConfig(data_dir=str(images)), out, 100),
        "smaller": lambda: prepare_imagenet(path, out, image_size=100),
    }
    before, limits = found_below(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(ValueError, match=rf"out\.{kind} cannot be written \(file too large\): free space there"):
            make_it[kind]()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert found_below(tmp_path) == before
