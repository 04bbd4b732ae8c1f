"""Compare two runs: which figures moved by more than the noise."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdiff.benchmarks.rows import Values, number, read_rows

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
_TIMED = {"speedup": ("speedup_p20", "speedup_p80"), "median_s": ("p20_s", "p80_s")}
_COUNTED = ("peak_gib", "gflop")
_UNITS = {"speedup": "×", "median_s": " s", "peak_gib": " GiB", "gflop": " GFLOP"}


class Change(NamedTuple):
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
        low, high = (self.now, self.before) if self.figure == "median_s" else (self.before, self.now)
        ratio = high / low if low else math.inf
        more, less = ("more", "less") if self.figure in _COUNTED else ("faster", "slower")
        share = f"{abs(ratio - 1):.1%} {less if ratio < 1 else more}"
        return f"{share}; {self.remark}" if self.remark else share


def read_measured(path: Path) -> list[dict[str, str]]:
    """The rows of a file that ``fastdiff benchmark --csv`` wrote; ValueError if it is not such a file.

    Call it before anything is measured, because the run may add its rows to the same file.
    """
    rows = read_rows(path, "compare")
    figures = {"rounds", *_UNITS}.union(*_TIMED.values())
    if not rows or not figures.union(KEY, ENVIRONMENT, ("against", "remark")) <= rows[0].keys():
        raise ValueError(f"compare {path} holds no rows that this version's fastdiff benchmark --csv wrote")
    for place, row in enumerate(rows, start=1):
        try:
            for name in figures:
                number(row, name)
        except ValueError:
            remedy = "name another file, or delete that row"
            raise ValueError(f"compare {path} is damaged in its row {place}: {remedy}") from None
    return rows


def moved(old: Sequence[Values], new: Sequence[Values]) -> list[Change]:
    """Figures of both runs that differ by more than the noise. The last of several rows of one candidate counts.

    A time is compared as the speedup over another candidate of the same rounds, if both runs have the same one: this
    cancels the machine's speed. It has moved if the medians are LEAST and WIDTHS apart and the intervals from p20 to
    p80 do not overlap. The baseline candidate itself has only seconds, which also move with the machine.
    """
    before, found = _latest(old), []
    for key, now in _latest(new).items():
        if key not in before:
            continue
        was = before[key]
        x, y = number(was, "median_s"), number(now, "median_s")
        few = _few(was, now)
        relative = was["against"] == now["against"] not in ("", key[2])
        timed = "speedup" if relative and not few else "median_s"
        remarks: dict[str, str] = {}  # of each figure that moved
        if math.isnan(x) != math.isnan(y):
            missing = f"not measured now; {now['remark']}".removesuffix("; ")
            remarks["median_s"] = "measured now" if math.isnan(x) else missing
        elif (x > GROSS * y or y > GROSS * x) if few else _apart(was, now, timed):
            remarks[timed] = "; ".join(["perhaps the machine"] * (timed == "median_s") + ["few rounds"] * few)
        for figure in _COUNTED:
            x, y = number(was, figure), number(now, figure)
            if abs(y - x) > LEAST_COUNT * max(x, y):
                remarks[figure] = ""
        found += [Change(*key, name, number(was, name), number(now, name), said) for name, said in remarks.items()]
    return found


def _few(*rows: Values) -> bool:
    """Whether all rows were timed, but one of them in too few rounds to know its spread."""
    return 0 < min(number(row, "rounds") for row in rows) < ENOUGH


def _apart(was: Values, now: Values, median: str) -> bool:
    low, high = _TIMED[median]
    if not (number(was, high) < number(now, low) or number(now, high) < number(was, low)):
        return False
    width = sum((number(row, high) - number(row, low)) / max(1, number(row, "rounds")) for row in (was, now)) / 2
    return abs(number(now, median) - number(was, median)) > max(LEAST * number(was, median), WIDTHS * width)


def print_comparison(old: Sequence[Values], new: Sequence[Values], console: Console) -> None:
    """Print how two runs differ: their environments, their rows, and the figures that moved."""
    before, now = _latest(old), _latest(new)
    both = now.keys() & before.keys()
    differ = set()
    for name in ENVIRONMENT:
        was, is_now = (", ".join(dict.fromkeys(str(r[key][name]) for key in r if key in both)) for r in (before, now))
        if was != is_now:
            console.print(f"{name}: {was} before, {is_now} now")
            differ.add(name)
    if differ & {"machine", "gpu"}:
        console.print("warning: the machines differ, so the times say nothing about the code")
    for when, rows, others in (("before", before, now), ("now", now, before)):
        alone = [key for key in rows if key not in others]
        if alone:
            console.print(f"rows only {when}: {len(alone)} ({_names(alone, {key[0] for key in others})})")
    unclear = sum(_few(before[key], now[key]) for key in both)
    if unclear:
        named = f"fewer than {ENOUGH}, so only a factor of {GROSS} is reported"
        console.print(f"too few rounds to tell: {unclear} of {len(both)} rows have {named}")
    changes = moved(old, new)
    if not both:
        console.print("nothing to compare: no row is in both runs")
    elif not changes:
        console.print(f"nothing moved by more than the noise, of {len(both)} rows")
    else:
        title = f"moved by more than the noise: {len({change[:3] for change in changes})} of {len(both)} rows"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
        for name in (*KEY, "before", "now", "change"):
            table.add_column(name, overflow="fold", no_wrap=name in ("before", "now"))
        for change in changes:
            values = (change.before, change.now)
            figures = ["" if math.isnan(value) else f"{value:.4g}{_UNITS[change.figure]}" for value in values]
            table.add_row(*map(Text, (*change[:3], *figures, str(change))))
        console.print(table)


def _latest(rows: Sequence[Values]) -> dict[Key, Values]:
    return {(str(row["suite"]), str(row["workload"]), str(row["candidate"])): row for row in rows}


def _names(keys: Sequence[Key], suites: set[str]) -> str:
    """The rows by table; only the name of a suite that the other run does not have."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for suite, workload, candidate in keys:
        tables.setdefault((suite, workload) if suite in suites else (suite,), []).append(candidate)
    return "; ".join(", ".join(t) + (f": {', '.join(c)}" if len(t) > 1 else "") for t, c in tables.items())
