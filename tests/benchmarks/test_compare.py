"""fastdiff benchmark --compare: what moved, and what only seems to have."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastdiff.benchmarks.compare import moved, print_comparison, read_measured
from fastdiff.benchmarks.harness import Timing
from fastdiff.benchmarks.rows import Row, append_rows

from ..support import refusal

ABOUT = {"machine": "a CPU, 2 threads", "gpu": "none", "torch": "2.13.0", "triton": "3.7.1", "commit": "1234567"}
BASELINE = (1.0, 1.1, 1.2)


def row(
    candidate: str,
    *seconds: float,
    first: tuple[float, ...] = BASELINE,
    against: str = "plain",
    times: int = 4,
    **values: object,
) -> dict[str, str]:
    """As read from a file; every second is that of so many rounds."""
    timing = Timing(candidate, seconds * times, first[: len(seconds)] * times) if seconds else None
    written = Row("unet", "32 pixels, batch 16", candidate, timing, against=against).as_dict()
    return {name: str(value) for name, value in (written | ABOUT | values).items()}


def plain(*seconds: float, **values: object) -> dict[str, str]:
    return row("plain", *(seconds or BASELINE), first=seconds or BASELINE, **values)


def printed(old: list[dict[str, str]], new: list[dict[str, str]]) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_comparison(old, new, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_ratio_moves_where_neither_spread_reaches_the_other() -> None:
    old = [plain(), row("compiled", 0.5, 0.55, 0.6)]
    (change,) = moved(old, [plain(), row("compiled", 0.4, 0.44, 0.48)])
    assert (change.candidate, change.figure, change.before, change.now) == ("compiled", "speedup", 2.0, 2.5)
    assert str(change) == "25.0% faster"
    wide = row("compiled", 0.4, 0.44, 0.6)  # 2.5, and in one round 2 as before
    assert moved(old, [plain(), wide]) == []
    (change,) = moved([plain(), row("compiled", 0.4, 0.44, 0.48)], old)
    assert str(change) == "20.0% slower"


def test_two_percent_are_not_told_however_narrow_the_spread() -> None:
    old = [plain(1.0, 1.0, 1.0), row("ours", 0.5, 0.5, 0.5, first=(1.0,) * 3)]
    assert moved(old, [old[0], row("ours", 0.491, 0.491, 0.491, first=(1.0,) * 3)]) == []
    assert len(moved(old, [old[0], row("ours", 0.489, 0.489, 0.489, first=(1.0,) * 3)])) == 1


def test_a_machine_that_slows_down_moves_the_first_candidate_alone() -> None:
    old = [plain(1.0, 1.1, 1.2), row("ours", 0.5, 0.55, 0.6)]
    new = [plain(2.0, 2.2, 2.4), row("ours", 1.0, 1.1, 1.2, first=(2.0, 2.2, 2.4))]
    (change,) = moved(old, new)
    assert (change.candidate, change.figure, change.before, change.now) == ("plain", "median_s", 1.1, 2.2)
    assert str(change) == "50.0% slower; perhaps the machine"


def test_ratios_to_different_candidates_are_not_compared() -> None:
    old = [plain(), row("ours", 0.5, 0.55, 0.6)]
    faster = (0.5, 0.55, 0.6)
    sdpa = row("SDPA", *faster, first=faster, against="SDPA")
    new = [sdpa, row("ours", 0.5, 0.55, 0.6, first=faster, against="SDPA")]
    assert moved(old, new) == []  # 2 times as fast as plain, then 1 time as fast as SDPA
    new = [sdpa, row("ours", 0.25, 0.275, 0.3, first=faster, against="SDPA")]
    (change,) = moved(old, new)
    assert (change.figure, str(change)) == ("median_s", "100.0% faster; perhaps the machine")
    # a file of several runs, in which one and the same candidate is measured against plain first, then against SDPA
    assert moved(old + new, new) == []
    assert moved(new, old + new) == []


def test_one_as_fast_as_the_first_is_no_first() -> None:
    old = [plain(), row("same", *BASELINE), row("ours", 0.5, 0.55, 0.6)]
    assert moved(old, [plain(), row("same", *BASELINE), row("ours", 0.5, 0.55, 0.6)]) == []
    slower = (2.0, 2.2, 2.4)  # the machine, and nothing but it
    new = [plain(*slower), row("same", *slower, first=slower), row("ours", 1.0, 1.1, 1.2, first=slower)]
    assert [change.candidate for change in moved(old, new)] == ["plain"]


def test_what_has_nothing_beside_it_is_compared_by_its_seconds() -> None:
    alone = (math.nan,) * 3
    old = row("batch 4", 1.0, 1.1, 1.2, first=alone, against="")
    new = row("batch 4", 0.5, 0.55, 0.6, first=alone, against="")
    (change,) = moved([old], [new])
    assert (change.figure, str(change)) == ("median_s", "100.0% faster; perhaps the machine")
    assert moved([old], [old]) == []


@pytest.mark.parametrize("rounds", [1, 4])
def test_few_rounds_say_nothing_but_what_is_gross(rounds: int) -> None:
    old = [plain(), row("ours", 0.5, 0.55, 0.6)]
    near, far = (row("ours", seconds, times=rounds) for seconds in (0.4, 0.3))
    assert moved(old, [plain(), near]) == []
    (change,) = moved(old, [plain(), far])
    assert str(change) == "83.3% faster; perhaps the machine; few rounds"
    told = "too few rounds to tell: 1 of 2 rows have fewer than 5, so only a factor of 1.5 is reported"
    assert (
        " ".join(printed(old, [plain(), near]).splitlines())
        == f"{told} nothing moved by more than the noise, of 2 rows"
    )
    assert told in printed([plain(), near], old)


@pytest.mark.parametrize("rounds", [5, 7, 11, 40])
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_two_runs_of_the_same_seldom_seem_to_differ(rounds: int, noise: float) -> None:
    """In less than one row of a hundred; a row is a candidate of its own here."""
    rng = np.random.default_rng(rounds)
    runs = [
        [
            row(str(i), *seconds, first=(1.0,) * rounds, times=1)
            for i, seconds in enumerate(rng.normal(1, noise, (2000, rounds)))
        ]
        for _ in range(2)
    ]
    assert len(moved(*runs)) < 20


def test_a_shift_of_five_percent_is_found_in_noise_of_one() -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        old, new = (row("ours", *rng.normal(mean, 0.01, 11), first=(1.0,) * 11, times=1) for mean in (1, 1.05))
        found += len(moved([old], [new]))
    assert found >= 190


def test_the_last_of_several_runs_counts() -> None:
    old = [plain(), row("ours", 0.1, 0.1, 0.1), plain(), row("ours", 0.5, 0.55, 0.6)]
    assert moved(old, [plain(), row("ours", 0.5, 0.55, 0.6)]) == []
    assert moved([plain(), row("ours", 0.5, 0.55, 0.6)], old) == []


@pytest.mark.parametrize(
    ("figure", "near", "far", "words"),
    [
        ("peak_gib", 2.02, 3.0, "50.0% more"),
        ("gflop", 2.0, 1.0, "50.0% less"),
        ("peak_gib", "nan", "0.0", "100.0% less"),
    ],
)
def test_memory_and_work_are_compared_as_counted(figure: str, near: object, far: object, words: str) -> None:
    old = [plain(**{figure: 2.0})]
    assert moved(old, [plain(**{figure: near})]) == []
    (change,) = moved(old, [plain(**{figure: far})])
    assert (change.figure, str(change)) == (figure, words)


def test_what_has_no_time_any_more_is_told_with_its_reason() -> None:
    timed, wrong = row("ours", 0.5, 0.55, 0.6), row("ours", remark="differs from the plain path")
    (change,) = moved([plain(), timed], [plain(), wrong])
    assert math.isnan(change.now)
    assert str(change) == "not measured now; differs from the plain path"
    (change,) = moved([plain(), wrong], [plain(), timed])
    assert (change.now, str(change)) == (0.55, "measured now")
    assert moved([plain(), wrong], [plain(), wrong]) == []


def test_the_table_names_the_row_and_both_figures() -> None:
    old = [plain(), row("[ours]", 0.5, 0.55, 0.6), row("gone", 1.0, times=5)]
    new = [plain(), row("[ours]", 0.4, 0.44, 0.48, torch="2.14.0"), row("new", 1.0), row("other", suite="train")]
    lines = printed(old, new).splitlines()
    assert lines[0] == "torch: 2.13.0 before, 2.13.0, 2.14.0 now"
    assert lines[1] == "rows only before: 1 (unet, 32 pixels, batch 16: gone)"
    assert lines[2] == "rows only now: 2 (unet, 32 pixels, batch 16: new; train)"
    assert lines[3].strip() == "moved by more than the noise: 1 of 2 rows"
    (cells,) = [" ".join(line.split()) for line in lines if "[ours]" in line]
    assert cells == "unet 32 pixels, batch 16 [ours] 2× 2.5× 25.0% faster"


def test_another_machine_is_warned_of_once() -> None:
    said = printed([plain()], [plain(gpu="a GPU", machine="another")])
    assert said.count("warning: the machines differ, so the times say nothing about the code") == 1
    assert "gpu: none before, a GPU now" in said
    assert "warning" not in printed([plain()], [plain(commit="7654321")])


def test_nothing_moved_and_nothing_to_compare() -> None:
    assert printed([plain()], [plain()]) == "nothing moved by more than the noise, of 1 rows\n"
    assert printed([], []) == "nothing to compare: no row is in both runs\n"
    assert "nothing to compare" in printed([], [plain()])


def test_what_the_benchmark_writes_is_read(tmp_path: Path) -> None:
    rows = [plain(), row("ours", 0.5), row("wrong", remark="not timed")]
    append_rows(tmp_path / "rows.csv", rows)
    assert read_measured(tmp_path / "rows.csv") == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no rows that this version's fastdiff benchmark --csv wrote"),
        ("suite,candidate,median_s\nunet,plain,1\n", "holds no rows that .*--csv"),
        (b"\x80\x81", "is not a CSV file in UTF-8"),
        ("{header}\n{row}\n".encode("utf-16"), "is not a CSV file in UTF-8"),
        ("a" * 200_000, "is not a CSV file"),
        ("{header}\n{row},more\n", "is damaged in its row 1"),
        ("{header}\n{row}\nunet,32 pixels, batch 16,pl", "is damaged in its row 2"),
        ("{header}\nunet,w,plain,3,fast\n", "is damaged in its row 1"),
        ("{header}\n{row}", "is damaged in its row 1"),
    ],
)
def test_other_files_are_refused(text: str | bytes, words: str, tmp_path: Path) -> None:
    path, good = tmp_path / "old.csv", tmp_path / "good.csv"
    append_rows(good, [plain()])
    header, written = good.read_text(encoding="utf-8").splitlines()
    data = text if isinstance(text, bytes) else text.replace("{header}", header).replace("{row}", written).encode()
    path.write_bytes(data)
    refusal(lambda: read_measured(path), rf"^compare \S*old\.csv {words}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for name, what in (("none.csv", "does not exist"), ("", "is not a file")):
        with pytest.raises(ValueError, match=rf"^compare \S+ {what}: name one that fastdiff benchmark --csv wrote$"):
            read_measured(tmp_path / name)


def test_a_spreadsheet_adds_a_mark(tmp_path: Path) -> None:
    append_rows(tmp_path / "a.csv", [plain()])
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes().replace(b"\n", b"\r\n"))
    append_rows(tmp_path / "b.csv", [row("ours", 0.5)])
    assert [read["candidate"] for read in read_measured(tmp_path / "b.csv")] == ["plain", "ours"]
