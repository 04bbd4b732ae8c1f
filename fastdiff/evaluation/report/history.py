"""The history of a run: progress.jsonl, read as a stream and thinned while it is read."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.runtime.files import open_regular

BUCKETS = 500
"""Stretches of steps that a history of more than twice as many rows is thinned to; each keeps its minimum and maximum,
so that a line has up to twice as many points."""

SMOOTHED = 0.05
"""The share of a run's rows of which the smoothed line is the median, of five rows at least."""

_LONGEST_LINE = 2**20
_LARGEST_STEP = 2**53
_MOST_OPEN = 2**16
_TERMS = ("loss", "mse", "vb", "acc1", "acc5")
_COLUMNS = frozenset(
    {f"{val}{term}{q}" for val in ("", "val_") for term in _TERMS for q in ("", "_q0", "_q1", "_q2", "_q3")}
    | {"grad_norm", "skipped", "lg_loss_scale", "lr", "images_per_s", "data_wait", "samples"}
)
LARGEST = 1e100
"""Numbers beyond it count as not finite."""

_TINY = 1 / LARGEST
_NOT_FINITE = (None, "NaN", "nan", "Infinity", "-Infinity")

Point = tuple[float, float | None]
"""A step and its value; None is a gap in the line."""


def known(points: Iterable[Point]) -> list[tuple[float, float]]:
    """The points without the gaps."""
    return [(step, value) for step, value in points if value is not None]


@dataclass(slots=True)
class _Cell:
    """One column in one stretch: sum and number of the values, the smallest and the largest as (value, step)."""

    total: float
    count: int
    low: tuple[float, int]
    high: tuple[float, int]

    def add(self, other: "_Cell") -> None:
        if not other.count:
            return
        if not self.count:
            self.low, self.high = other.low, other.high
        self.total, self.count = self.total + other.total, self.count + other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(slots=True)
class _Stretch:
    first: int
    last: int
    cells: dict[str, _Cell]


@dataclass
class History:
    """The columns of a run over its steps. ``last`` is the last row; ``rows`` counts them, ``damaged`` the other lines.

    ``cut_off`` says that the file ends in half a line, as a killed or running process leaves it. Where steps go back,
    as after a resumed run, the later rows replace the earlier ones.
    """

    rows: int = 0
    damaged: int = 0
    cut_off: bool = False
    went_back: int = 0
    last: dict[str, float] = field(default_factory=dict)
    _width: int = 1
    _stretches: list[_Stretch] = field(default_factory=list)
    _open: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)
    _samples: float = 0.0
    _first: tuple[float, float] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of progress.jsonl; ValueError if it has no step, or something else than numbers."""
        step = row.get("step")
        if type(step) is float and step.is_integer():
            step = int(step)
        if type(step) is not int or not 0 <= step < _LARGEST_STEP:
            raise ValueError(f"a row without a step: {step!r}")
        values = {column: _finite(row[column]) for column in row.keys() & _COLUMNS}
        previous = self._open[-1][0] if self._open else self._stretches[-1].last if self._stretches else -1
        if step <= previous:
            self._go_back(step)
        values |= self._seconds(values.get("samples"), values.get("images_per_s"))
        self.rows += 1
        if self._open and (step // self._width != self._open[0][0] // self._width or len(self._open) == _MOST_OPEN):
            self._close()
        self._open.append((step, values))

    def _seconds(self, samples: float | None, speed: float | None) -> dict[str, float]:
        """The duration since the row before, as a column."""
        if not samples or not speed or speed <= 0:
            return {}
        new, before = samples - self._samples, self._samples
        self._samples = samples
        if not before:
            # A run that continues another's weights counts that run's samples in its first row: its duration is that of
            # as many samples as the second row adds, at most.
            self._first = (samples, speed)
            return {}
        first, self._first = self._first, None
        return {"seconds": max(new, 0) / speed + (min(first[0], max(new, 0)) / first[1] if first else 0)}

    def _go_back(self, step: int) -> None:
        """Drop what was logged at ``step`` and later."""
        self.went_back += 1
        self._open = [row for row in self._open if row[0] < step]
        while self._stretches and self._stretches[-1].first >= step:
            self._stretches.pop()
        if not self._stretches:
            self._width = 1
        if self._stretches and (end := self._stretches[-1]).last >= step:
            end.last = step - 1
            for column, cell in list(end.cells.items()):
                kept = {point for point in (cell.low, cell.high) if point[1] < step} if cell.count else set()
                if kept:
                    end.cells[column] = _Cell(sum(v for v, _ in kept), len(kept), min(kept), max(kept))
                else:
                    del end.cells[column]

    def _close(self) -> None:
        """Turn the open rows into a stretch; if there are too many stretches, make them twice as wide."""
        if not self._open:
            return
        step, values = self._open[-1]
        self.last = {"step": step} | {column: value for column, value in values.items() if value is not None}
        cells: dict[str, _Cell] = {}
        for column in dict.fromkeys(column for _, values in self._open for column in values):
            there = [(v, step) for step, values in self._open if (v := values.get(column)) is not None]
            if there:
                cells[column] = _Cell(math.fsum(v for v, _ in there), len(there), min(there), max(there))
            else:
                cells[column] = _Cell(0.0, 0, (math.nan, 0), (math.nan, 0))
        self._stretches.append(_Stretch(self._open[0][0], self._open[-1][0], cells))
        self._open = []
        while len(self._stretches) > 2 * BUCKETS:
            self._widen()

    def _widen(self) -> None:
        self._width *= 2
        wider: list[_Stretch] = []
        for stretch in self._stretches:
            if wider and wider[-1].first // self._width == stretch.first // self._width:
                wider[-1].last = stretch.last
                for column, cell in stretch.cells.items():
                    if column in wider[-1].cells:
                        wider[-1].cells[column].add(cell)
                    else:
                        wider[-1].cells[column] = cell
            else:
                wider.append(stretch)
        self._stretches = wider

    def close(self) -> None:
        """End the history: no row follows."""
        self._close()
        while self.thinned and len(self._stretches) > BUCKETS:
            self._widen()

    @property
    def thinned(self) -> bool:
        """Whether a stretch may hold several rows."""
        return self._width > 1

    @property
    def seconds(self) -> float:
        """The time of the updates, without checkpoints and previews."""
        return self.total("seconds") + (self._first[0] / self._first[1] if self._first else 0)

    def has(self, column: str) -> bool:
        """Whether the column has any value."""
        return any(cell.count for cell in self._cells(column))

    def total(self, column: str) -> float:
        """The sum of a column."""
        return math.fsum(cell.total for cell in self._cells(column))

    def _cells(self, column: str) -> Iterator[_Cell]:
        return (stretch.cells[column] for stretch in self._stretches if column in stretch.cells)

    def points(self, column: str) -> list[Point]:
        """The column's values by step, of every stretch the smallest and the largest."""
        found: list[Point] = []
        for stretch in self._stretches:
            cell = stretch.cells.get(column)
            if cell is None:
                continue
            if not cell.count:
                found.append((stretch.first, None))
                continue
            found += [(step, value) for step, value in sorted({(s, v) for v, s in (cell.low, cell.high)})]
        return found

    def median(self, column: str) -> list[Point]:
        """The median of the SMOOTHED share of the rows around each row, of fewer at the start.

        In a thinned history it is the median of the means of stretches.
        """
        there = [(s, c) for s in self._stretches if (c := s.cells.get(column)) is not None]
        means = [c.total / c.count if c.count else None for _, c in there]
        radius = max(2, round(SMOOTHED * len(there) / 2))
        found: list[Point] = []
        for i, (stretch, cell) in enumerate(there):
            near = [m for m in means[i - min(radius, i) : i + min(radius, i) + 1] if m is not None]
            middle = (stretch.first + stretch.last) / 2
            found.append((middle, statistics.median(near) if near and cell.count else None))
        return found

    def sums(self, column: str) -> list[tuple[int, float]]:
        """The steps at which the column is not zero, and the sums there."""
        there = ((s.cells[column].high[1], s.cells[column].total) for s in self._stretches if column in s.cells)
        return [(step, total) for step, total in there if total]


def read_history(path: Path) -> History:
    """Read progress.jsonl; an empty history if there is no such file. OSError if it cannot be read.

    One line is in memory at a time. Lines that are not rows are counted and left out.
    """
    history = History()
    if not path.exists():
        return history
    with open_regular(path) as file:
        while line := file.readline(_LONGEST_LINE):
            whole = line.endswith(b"\n")
            if not whole and len(line) == _LONGEST_LINE:
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                line, whole = b"{", bool(rest)
            if not line.strip():
                continue
            try:
                history.add(_row(line))
            except (ValueError, RecursionError):
                if whole:
                    history.damaged += 1
                else:
                    history.cut_off = True
    history.close()
    return history


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not a row")
    return row


def _finite(value: object) -> float | None:
    """The number that a row holds; None if it is not finite, or so large that no chart can show it."""
    if type(value) is float or type(value) is int:
        return 0.0 if abs(value) < _TINY else float(value) if abs(value) <= LARGEST else None
    if value in _NOT_FINITE:
        return None
    raise ValueError(f"not a number: {value!r}")
