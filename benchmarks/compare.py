"""Compare two runs: which figures moved by more than the noise."""

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
"""Least relative difference of medians that counts. Two processes differ by up to this much because of where their
memory lies, which the rounds within one process do not show."""

ENOUGH = 5
"""Rounds from which a spread is known; with fewer only a factor of GROSS is reported."""

GROSS = 1.5

WIDTHS = 20
"""Medians of n rounds differ if their distance exceeds this many times the width from p20 to p80, divided by n. Between
two equal runs, whatever their noise, fewer than one row in a hundred then seems to have moved, from ENOUGH rounds on;
this was found by drawing from a Gaussian. The divisor is n, not its root, because the width of a few rounds may be
small by chance."""

LEAST_COUNT = 0.01
"""LEAST for memory and operations, which are counted: an allocator rounds, and a file has four digits."""

KEY = ("suite", "workload", "candidate")
ENVIRONMENT = ("machine", "gpu", "torch", "triton", "commit")
_SPEEDUP, _SECONDS = (("speedup", "speedup_p20", "speedup_p80"), ("median_s", "p20_s", "p80_s"))
_COUNTED = ("peak_gib", "gflop")
_UNITS = {"speedup": "×", "median_s": " s", "peak_gib": " GiB", "gflop": " GFLOP"}


@dataclass(frozen=True)
class Change:
    """A changed figure of one candidate on one workload; NaN if it was not measured."""

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
    """The rows of a file that ``fastdiff benchmark --csv`` wrote; ValueError if it is not such a file.

    Call it before anything is measured, because the run may add its rows to the same file.
    """
    rows = read_rows(path, "compare")
    figures = (*_SPEEDUP, *_SECONDS, *_COUNTED, "rounds")
    wanted = {*KEY, "against", *figures, "remark", *ENVIRONMENT}
    if not rows or not wanted <= rows[0].keys():
        raise ValueError(f"compare {path} holds no rows that this version's fastdiff benchmark --csv wrote")
    for number, row in enumerate(rows, start=1):
        if not all(_is_number(row[name]) for name in figures):
            raise ValueError(f"compare {path} is damaged in its row {number}: name another file, or delete that row")
    return rows


def moved(old: Rows, new: Rows) -> list[Change]:
    """Figures of both runs that differ by more than the noise. The last of several rows of one candidate counts.

    A time is compared as the speedup over another candidate of the same rounds, if both runs have the same one: this
    cancels the machine's speed. It has moved if the medians are LEAST and WIDTHS apart and the intervals from p20 to
    p80 do not overlap. The baseline candidate itself has only seconds, which also move with the machine.
    """
    before, now = _latest(old), _latest(new)
    found = []
    for key in now:
        if key not in before:
            continue
        a, b = before[key], now[key]
        x, y = _number(a, "median_s"), _number(b, "median_s")
        if math.isnan(x) != math.isnan(y):
            remark = "measured now" if math.isnan(x) else f"not measured now; {b['remark']}".removesuffix("; ")
            found.append(Change(*key, "median_s", x, y, remark))
        relative = a["against"] == b["against"] not in ("", key[2])
        figures = _SPEEDUP if relative else _SECONDS
        if _few(a, b):
            figures, apart = _SECONDS, y > GROSS * x or x > GROSS * y
        else:
            apart = _apart(a, b, figures)
        if apart:
            remarks = ["perhaps the machine"] * (figures is _SECONDS) + ["few rounds"] * _few(a, b)
            x, y = _number(a, figures[0]), _number(b, figures[0])
            found.append(Change(*key, figures[0], x, y, "; ".join(remarks)))
        for figure in _COUNTED:
            x, y = _number(a, figure), _number(b, figure)
            if abs(y - x) > LEAST_COUNT * max(x, y):
                found.append(Change(*key, figure, x, y))
    return found


def _few(*rows: Mapping[str, object]) -> bool:
    """Whether all rows were timed, but one of them in too few rounds to know its spread."""
    return 0 < min(_number(row, "rounds") for row in rows) < ENOUGH


def _apart(a: Mapping[str, object], b: Mapping[str, object], figures: tuple[str, str, str]) -> bool:
    median, low, high = figures
    x, y = _number(a, median), _number(b, median)
    if not (_number(a, high) < _number(b, low) or _number(b, high) < _number(a, low)):
        return False
    width = sum((_number(row, high) - _number(row, low)) / max(1, _number(row, "rounds")) for row in (a, b)) / 2
    return abs(y - x) > max(LEAST * x, WIDTHS * width)


def print_comparison(old: Rows, new: Rows, console: "Console") -> None:
    """Print how two runs differ: their environments, their rows, and the figures that moved."""
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
        say("warning: the machines differ, so the times say nothing about the code")
    for when, rows, others in (("before", before, now), ("now", now, before)):
        alone = [key for key in rows if key not in others]
        if alone:
            say(f"rows only {when}: {len(alone)} ({_names(alone, {key[0] for key in others})})")
    unclear = sum(_few(before[key], now[key]) for key in both)
    if unclear:
        named = f"fewer than {ENOUGH}, so only a factor of {GROSS} is reported"
        say(f"too few rounds to tell: {unclear} of {len(both)} rows have {named}")
    changes = moved(old, new)
    if not both:
        say("nothing to compare: no row is in both runs")
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


def _names(keys: Sequence[Key], suites: set[str]) -> str:
    """The rows by table; only the name of a suite that the other run does not have."""
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
