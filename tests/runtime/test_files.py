"""Files and folders that are whole or absent."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from fastdiff.runtime.files import replacing, replacing_folder, whole

from ..data.archive_support import found_below


def test_an_interrupted_write_leaves_the_old_file_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            assert path.parent in temporary.parents  # on the same disk, or it could not be renamed
            temporary.write_text("half")
            (temporary.parent / "a library's own.tmp").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert found_below(tmp_path) == {"a.txt"}


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one:
        with replacing(path) as other:
            one.write_text("one")
            other.write_text("other")
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert found_below(tmp_path) == {"a.txt"}


def make(kind: str) -> Callable[[Path], object]:
    return {"file": lambda path: path.write_text("new"), "folder": lambda path: (path / "sub").mkdir(parents=True)}[
        kind
    ]


def test_a_folder_returns_if_the_new_one_cannot_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "model", Path.rename

    def write(text: str) -> None:
        with replacing_folder(path) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)

    def fails_for_the_new_one(own: Path, to: Path) -> Path:
        if (own / "file").read_text() == "new":
            raise OSError("no")
        return rename(own, to)

    write("old")
    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="no"):
        write("new")
    assert (path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write("new")
    assert (path / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


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


def test_an_empty_folder_that_is_filled_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def attempt() -> None:
        with whole(tmp_path / "out") as folder:
            make("folder")(folder)
            (tmp_path / "out/theirs").touch()

    with pytest.raises(ValueError, match="out cannot be written"):
        attempt()
    assert found_below(tmp_path) == {"out", "out/theirs"}


def test_what_a_killed_run_left_is_named(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd1234.tmp").mkdir()
    with pytest.warns(UserWarning, match=r"\.out\.abcd1234\.tmp may be left"), whole(tmp_path / "out") as folder:
        folder.mkdir()
    assert found_below(tmp_path) == {"out", ".out.abcd1234.tmp"}


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_followed(tmp_path: Path, dangling: bool) -> None:
    if not dangling:
        (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    with whole(tmp_path / "out") as folder:
        make("folder")(folder)
    assert (tmp_path / "out").is_symlink()
    assert found_below(tmp_path) == {"out", "there", "there/sub"}


def test_links_in_a_circle_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("loop", "pipe"):
        with pytest.raises(ValueError, match=f"{name} exists already"), whole(tmp_path / name):
            pytest.fail("it is there")


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / ".o.abcd1234.tmp").mkdir()
    for name in ("[o]", "**", "*"):
        with whole(tmp_path / name) as file:  # any warning is an error
            make("file")(file)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file/out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=r"cannot be written \(.*\): free space there") as caught, whole(out):
            pytest.fail("it cannot be made")
        assert str(caught.value).startswith(str(out))


def test_errors_of_other_files_are_theirs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), whole(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere"), whole(tmp_path / "out"):
        Path("/nowhere").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whole_or_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def attempt() -> None:
        with whole(tmp_path / "out") as folder:
            make("folder")(folder)
            raise error

    with pytest.raises(error):
        attempt()
    assert found_below(tmp_path) == set()
