"""What moved since another run, by more than its noise."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff.benchmarks.rows import read_rows

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[Mapping[str, object]]
Key = tuple[str, str, str]

LEAST = 0.02
"""Medians that are closer say nothing: a process is faster or slower than the next by as much, by where its memory
lies, and the rounds within one do not show it."""

LEAST_COUNT = 0.01
"""The same of memory and operations, which are counted: an allocator rounds, and a file has four digits."""

KEY = ("suite", "workload", "candidate")
ENVIRONMENT = ("machine", "gpu", "torch", "triton", "commit")
_SPEEDUP, _SECONDS = (("speedup", "speedup_p20", "speedup_p80"), ("median_s", "p20_s", "p80_s"))
_COUNTED = ("peak_gib", "gflop")
_UNITS = {"speedup": "×", "median_s": " s", "peak_gib": " GiB", "gflop": " GFLOP"}


@dataclass(frozen=True)
class Change:
    """A figure of one candidate on one workload that is not what it was; NaN is one that was not measured."""

    suite: str
    workload: str
    candidate: str
    figure: str  # speedup, median_s, peak_gib or gflop
    before: float
    now: float
    remark: str = ""

    def __str__(self) -> str:
        if math.isnan(self.before) or math.isnan(self.now):
            return self.remark
        counted = self.figure in _COUNTED
        low, high = (self.now, self.before) if self.figure == "median_s" else (self.before, self.now)
        ratio = high / low if low else math.inf
        words = ("more", "less") if counted else ("faster", "slower")
        share = f"{abs(ratio - 1):.1%} {words[ratio < 1]}"
        return f"{share}; {self.remark}" if self.remark else share


def read_measured(path: Path) -> list[dict[str, str]]:
    """The rows of a file that ``fastdiff benchmark --csv`` wrote; ValueError where it is no such file.

    To be called before anything is measured: the run may add its own rows to the same file.
    """
    try:
        rows = read_rows(path)
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is not a CSV file: name one that fastdiff benchmark --csv wrote") from None
    figures = (*_SPEEDUP, *_SECONDS, *_COUNTED)
    missing = [name for name in (*KEY, "rounds", *figures, "remark", *ENVIRONMENT) if name not in header]
    if missing:
        raise ValueError(f"{path} has no columns {', '.join(missing)}: name a file that fastdiff benchmark --csv wrote")
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header) or None in row.values() or not all(_is_number(row[name]) for name in figures):
            raise ValueError(f"{path} is damaged in its row {number}: name another file, or delete that row")
    return rows


def moved(old: Rows, new: Rows) -> list[Change]:
    """What is in both and differs by more than the noise; of several rows of one candidate the last one counts.

    A time is compared as how many times as fast as the first candidate of the same rounds: the machine's pace is not in
    that. It has moved where the medians are LEAST apart and neither interval from p20 to p80 reaches the other. A first
    candidate has only its seconds, which move with the machine, too.
    """
    before, now = _latest(old), _latest(new)
    first_before, first_now = _first(before), _first(now)
    found = []
    for key in now:
        if key not in before:
            continue
        a, b = before[key], now[key]
        x, y = _number(a, "median_s"), _number(b, "median_s")
        if math.isnan(x) != math.isnan(y):
            remark = "measured now" if math.isnan(x) else f"not measured now; {b['remark']}".removesuffix("; ")
            found.append(Change(*key, "median_s", x, y, remark))
        measures = first_before.get(key[:2]), first_now.get(key[:2])
        relative = measures[0] == measures[1] is not None and not (_own_measure(a) or _own_measure(b))
        figure, low, high = _SPEEDUP if relative else _SECONDS
        x, y = _number(a, figure), _number(b, figure)
        apart = _number(a, high) < _number(b, low) or _number(b, high) < _number(a, low)
        if apart and abs(y - x) > LEAST * x:
            alone = "1" in (str(a["rounds"]), str(b["rounds"]))
            remarks = ["perhaps the machine"] * (not relative) + ["spread unknown: one round"] * alone
            found.append(Change(*key, figure, x, y, "; ".join(remarks)))
        for figure in _COUNTED:
            x, y = _number(a, figure), _number(b, figure)
            if abs(y - x) > LEAST_COUNT * max(x, y):
                found.append(Change(*key, figure, x, y))
    return found


def print_comparison(old: Rows, new: Rows, console: "Console") -> None:
    """Say in what two runs differ: where and with what they ran, which rows they have, and what moved."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    before, now = _latest(old), _latest(new)
    both = now.keys() & before.keys()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    differ = []
    for name in ENVIRONMENT:
        was, is_now = (", ".join(dict.fromkeys(str(r[key][name]) for key in r if key in both)) for r in (before, now))
        if was != is_now:
            say(f"{name}: {was} before, {is_now} now")
            differ.append(name)
    if {"machine", "gpu"} & set(differ):
        say("warning: that is another machine, and its times say nothing about the code")
    for when, rows, others in (("before", before, now), ("now", now, before)):
        alone = [key for key in rows if key not in others]
        if alone:
            say(f"rows only {when}: {len(alone)} ({_names(alone, {key[0] for key in others})})")
    changes = moved(old, new)
    if not both:
        say("nothing to compare: no row is in both")
    elif not changes:
        say(f"nothing moved by more than the noise, of {len(both)} rows")
    else:
        rows_moved = {(c.suite, c.workload, c.candidate) for c in changes}
        title = f"moved by more than the noise: {len(rows_moved)} of {len(both)} rows"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
        for name in ("suite", "workload", "candidate", "before", "now", "change"):
            table.add_column(name, overflow="fold", no_wrap=name in ("before", "now"))
        for change in changes:
            values = (change.before, change.now)
            figures = ["" if math.isnan(value) else f"{value:.4g}{_UNITS[change.figure]}" for value in values]
            cells = (change.suite, change.workload, change.candidate, *figures, str(change))
            table.add_row(*map(Text, cells))
        console.print(table)


def _latest(rows: Rows) -> dict[Key, Mapping[str, object]]:
    return {(str(row["suite"]), str(row["workload"]), str(row["candidate"])): row for row in rows}


def _first(rows: dict[Key, Mapping[str, object]]) -> dict[tuple[str, str], str]:
    """The candidate that the others of its table are measured against."""
    return {key[:2]: key[2] for key in reversed(rows) if _own_measure(rows[key])}


def _own_measure(row: Mapping[str, object]) -> bool:
    return all(_number(row, name) == 1 for name in _SPEEDUP)


def _names(keys: Sequence[Key], suites: set[str]) -> str:
    """The rows by table; the name alone of a suite that the other run does not have at all."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for suite, workload, candidate in keys:
        tables.setdefault((suite, workload) if suite in suites else (suite,), []).append(candidate)
    return "; ".join(", ".join(t) + (f": {', '.join(c)}" if len(t) > 1 else "") for t, c in tables.items())


def _number(row: Mapping[str, object], name: str) -> float:
    return float(str(row[name]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
