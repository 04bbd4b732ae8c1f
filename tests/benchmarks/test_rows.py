"""The CSV file: what can be written to is found out before, and rows are added whole or not at all."""

import os
from pathlib import Path

import pytest

from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.rows import Row, append_rows, read_rows, require_columns, with_against

ROW = {"a": "1", "b": "two, three"}


def test_a_new_file_has_a_header_and_an_empty_one_gets_it(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    for name in ("deep/new.csv", "empty.csv"):
        append_rows(tmp_path / name, [ROW])
        append_rows(tmp_path / name, [ROW])
        assert (tmp_path / name).read_text(encoding="utf-8") == 'a,b\n1,"two, three"\n1,"two, three"\n'
        assert read_rows(tmp_path / name) == [ROW, ROW]


@pytest.mark.parametrize(
    "kind", ["folder", "fifo", "device", "link to nothing", "link to itself", "proc", "below a file"]
)
def test_what_is_no_file_is_refused_before(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/full")
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "gone.csv")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "proc":
        path = Path("/proc/rows.csv")
    else:
        path.touch()
        path = path / "rows.csv"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^csv \S+ (is|cannot be written)[^\n]*$"):
        require_columns(path, ["a", "b"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a,c\n", "has different columns: move it away or name another file"),
        (b"a,b\n1,2\n1", "is damaged in its row 2"),
        (b"a,b\n1,2", "is damaged in its row 1"),
        (b"\xff\xfea\x00", "is not a CSV file in UTF-8"),
        (b"a" * 200_000, "is not a CSV file in UTF-8"),
    ],
)
def test_another_file_stays_as_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^csv \S*rows\.csv {words}"):
        append_rows(path, [ROW])
    assert path.read_bytes() == content


@pytest.mark.parametrize("old", [b"", b'a,b\n1,"two, three"\n'])
def test_a_full_disk_leaves_the_file_as_it_was(old: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "rows.csv", Path.open
    if old:
        path.write_bytes(old)

    def opened(self: Path, mode: str = "r", **options: object) -> object:
        if mode == "ab":
            with real(self, mode) as file:
                file.write(b"half a r")
            return real(Path("/dev/full"), "wb")
        return real(self, mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match=r"^csv \S*rows\.csv cannot be written: No space left on device$"):
        append_rows(path, [ROW])
    assert (path.read_bytes() if path.exists() else b"") == old


def test_a_speedup_says_over_whom() -> None:
    rounds = (1.0, 2.0)
    rows = [
        Row("kernels", "a", "wrong", None),
        Row("kernels", "a", "plain", Timing("plain", list(rounds), rounds)),
        Row("kernels", "a", "same", Timing("same", [1.0, 2.1], rounds)),
        Row("kernels", "a", "alone", Timing("alone", rounds, [float("nan")] * 2)),
    ]
    assert [row.as_dict()["against"] for row in with_against(rows)] == ["", "plain", "plain", ""]
    assert [row.against for row in with_against([rows[2]])] == [""]  # the first one has no time here
