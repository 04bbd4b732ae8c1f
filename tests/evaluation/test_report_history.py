"""The history of a run as a report reads it: a stream, thinned without losing an extreme."""

import json
import math
import random
from pathlib import Path

import pytest

from fastdiff.evaluation.report import history as module
from fastdiff.evaluation.report.history import BUCKETS, History, known, read_history

from .report_support import Row, row, rows, write_rows


def read(tmp_path: Path, progress: list[Row], end: str = "") -> History:
    write_rows(tmp_path, progress)
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write(end)
    return read_history(tmp_path / "progress.jsonl")


def test_a_short_history_is_kept_as_it_is(tmp_path: Path) -> None:
    history = read(tmp_path, rows())
    assert (history.rows, history.damaged, history.cut_off, history.thinned) == (10, 0, False, False)
    assert history.points("loss") == [(step, 10 / step) for step in range(10, 101, 10)]
    assert history.points("loss_q3") == [(step, 4 * 10 / step) for step in range(10, 101, 10)]
    assert history.last["step"] == 100
    assert history.seconds == pytest.approx(400 / 8)  # images by images per second
    assert not history.has("vb")
    assert history.points("vb") == []


def test_the_running_median_leaves_a_spike_out(tmp_path: Path) -> None:
    losses = [5, 4, 3, 2, 100, 2, 2, 1, 1, 1]
    history = read(tmp_path, [row(10 * i + 10, loss) for i, loss in enumerate(losses)])
    smooth = [value for _, value in history.median("loss")]
    assert smooth == [5, 4, 4, 3, 2, 2, 2, 1, 1, 1]  # of 1, 3, 5 rows and so on, and of 4 and 3 at the end


def test_a_long_history_is_thinned_to_its_extremes(tmp_path: Path) -> None:
    random.seed(0)
    losses = [random.random() + 1 for _ in range(20_000)]
    losses[1234], losses[17_777] = 50.0, 0.001
    history = read(tmp_path, [{"step": 3 * i + 3, "loss": loss} for i, loss in enumerate(losses)])
    found = known(history.points("loss"))
    assert BUCKETS / 2 < len(history.median("loss")) <= BUCKETS
    assert len(found) <= 2 * BUCKETS
    assert history.thinned
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps))
    assert max(found, key=lambda point: point[1]) == (3 * 1235, 50.0)
    assert min(found, key=lambda point: point[1]) == (3 * 17_778, 0.001)
    assert all(losses[int(step) // 3 - 1] == value for step, value in found)
    assert history.total("loss") == pytest.approx(math.fsum(losses))


def test_only_a_few_rows_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0

    def closing(self: History) -> None:
        nonlocal most
        most = max(most, len(self._open), len(self._stretches))
        close(self)

    close = History._close
    monkeypatch.setattr(module, "BUCKETS", 50)
    monkeypatch.setattr(History, "_close", closing)
    read(tmp_path, [{"step": i, "loss": 1.0} for i in range(5000)])
    assert most <= 128


def test_a_step_in_billions_and_one_row(tmp_path: Path) -> None:
    history = read(tmp_path, [{"step": i**4, "loss": 1.0 + i} for i in range(1, 3000)])
    assert len(history.median("loss")) <= BUCKETS
    assert history.last["step"] == 2999**4
    history = read(tmp_path, [row(7, 0.5)])
    assert history.points("loss") == history.median("loss") == [(7, 0.5)]
    assert history.seconds == pytest.approx(28 / 8)


@pytest.mark.parametrize("width", [1, 8])
def test_where_steps_go_back_the_later_rows_count(tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKETS", 100 if width == 1 else 10)
    first = [row(step, 1.0) for step in range(1, 81)]
    again = [row(step, 2.0) for step in range(41, 101)]
    history = read(tmp_path, first + again)
    found = known(history.points("loss"))
    steps = [step for step, _ in found]
    assert steps == sorted(set(steps))
    assert history.went_back == 1
    assert {value for step, value in found if step <= 40} == {1.0}
    assert {value for step, value in found if step > 40} == {2.0}
    assert history.thinned == (width > 1)


def test_the_same_steps_over_and_over(tmp_path: Path) -> None:
    history = read(tmp_path, [row(5, float(i)) for i in range(300)] + [row(2, 9.0)])
    assert history.points("loss") == [(2, 9.0)]


def test_a_gap_where_no_update_was_kept(tmp_path: Path) -> None:
    history = read(tmp_path, [row(10, 1.0), row(20, None, skipped=10), row(30, 0.5, skipped=2)])
    assert history.points("loss") == [(10, 1.0), (20, None), (30, 0.5)]
    assert [value is None for _, value in history.median("loss")] == [False, True, False]
    assert history.sums("skipped") == [(20, 10), (30, 2)]
    assert history.total("skipped") == 12


def test_columns_that_only_some_rows_have_leave_no_gap(tmp_path: Path) -> None:
    history = read(tmp_path, [row(10, 1.0), row(20, 0.9, val_loss=1.1), row(30, 0.8), row(40, 0.7, val_loss=1.0)])
    assert history.points("val_loss") == [(20, 1.1), (40, 1.0)]


def test_a_run_that_continues_another_ones_samples(tmp_path: Path) -> None:
    """Its first row has all samples of the other run, which were not drawn in this one."""
    history = read(tmp_path, [row(step, 1.0) for step in (10_010, 10_020, 10_030)])
    assert history.seconds == pytest.approx(3 * 40 / 8)


@pytest.mark.parametrize("half", ['{"step": 110, "lo', '{"step": 110', "{", "\x00\x00\x00", '"'])
def test_half_a_last_line(tmp_path: Path, half: str) -> None:
    history = read(tmp_path, rows(), half)
    assert history.cut_off
    assert (history.rows, history.damaged) == (10, 0)


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    good = [json.dumps(one) for one in rows()]
    bad = [
        *("{", "[]", "3", "null", '"text"', "{}", '{"step": null}', '{"step": "3"}', '{"step": true}', "[" * 100_000),
        *('{"step": -1}', '{"step": 1e400}', '{"step": 1.5}', '{"step": 99999999999999999999}', "x" * 3_000_000),
        *('{"step": 10, "loss": "much"}', '{"step": 10, "loss": [1]}', '{"step": 10, "loss": true}', "\ud800", "\xff"),
        '{"step": ' + "9" * 5000 + "}",
    ]
    lines = [line for pair in zip(good, [*bad], strict=False) for line in pair] + bad[len(good) :] + good[len(bad) :]
    path = tmp_path / "progress.jsonl"
    path.write_bytes("\n".join([*lines, "", ""]).encode(errors="surrogatepass"))
    history = read_history(path)
    assert (history.rows, history.damaged, history.cut_off) == (10, len(bad), False)
    assert history.points("loss") == [(step, 10 / step) for step in range(10, 101, 10)]


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": NaN}\n{"step": 2.0, "loss": 1e999}\n{"step": 3, "loss": -Infinity, "lr": "NaN"}\n'
    text += '{"step": 4, "loss": 1' + "0" * 4000 + '}\n{"step": 5, "loss": 1, "unknown": {"a": []}, "lr": 2}\n'
    (tmp_path / "progress.jsonl").write_text(text)
    history = read_history(tmp_path / "progress.jsonl")
    assert history.points("loss") == [(1, None), (2, None), (3, None), (4, None), (5, 1.0)]
    assert history.points("lr") == [(3, None), (5, 2.0)]
    assert history.damaged == 0


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    assert read_history(tmp_path / "progress.jsonl").rows == 0
    assert read(tmp_path, []).last == {}
