"""Axes: the range of a chart, its ticks, and how their numbers are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Axis:
    """A range of values, ``low`` below ``high``, on a linear or a logarithmic scale."""

    low: float
    high: float
    log: bool = False
    percent: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log(max(value, 1e-300)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Up to about ``most`` round values inside the range, at least two."""
        if self.log and (found := self._decades(most)):
            return found
        raw = (self.high - self.low) / max(most, 1)
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(s * size for s in _STEPS if s * size >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]

    def _decades(self, most: int) -> list[float]:
        """The powers of ten, with 2 and 5 times them where there is room; empty if they are too few."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        tries = [((1, 2, 5), 1), ((1, 3), 1), *(((1,), every) for every in range(1, len(exponents) + 1))]
        for factors, every in tries:
            values = [f * 10.0**e for e in exponents if e % every == 0 for f in factors]
            inside = [v for v in values if self.low <= v * (1 + 1e-9) and v <= self.high * (1 + 1e-9)]
            if 2 <= len(inside) <= most + 1:
                return inside
        return []

    def label(self, value: float) -> str:
        """A tick's number."""
        if self.percent:
            share = 100 * value
            return f"{share:.0f}%" if abs(share - round(share)) < 1e-6 else f"{share:.3g}%"
        return short(value)


def short(value: float) -> str:
    """A number with few characters: 0.0005, 20, 1,500, 20k, 1.5M, 1e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{unit}"
    if value == 0 or abs(value) >= 1e-4:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**exponent:.3g}e{exponent}"


def vertical(values: Iterable[float], *, log: bool = False, from_zero: bool = False, percent: bool = False) -> Axis:
    """An axis around the values, with a little room; logarithmic if ``log`` and all are positive and differ enough."""
    found = [v for v in values if math.isfinite(v)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    if log and low > 0 and high / low > 1.5:
        room = (high / low) ** 0.04
        return Axis(low / room, high * room, log=True)
    if from_zero and low >= 0:
        low = 0.0
    if low == high:
        room = abs(low) / 2 or 1.0
        return Axis(0.0 if from_zero and low >= 0 else low - room, high + room, percent=percent)
    room = (high - low) * 0.05
    return Axis(0.0 if from_zero and low >= 0 else low - room, high + room, percent=percent)


def horizontal(steps: Iterable[float]) -> Axis:
    """The axis of steps, from the first to the last, or from 0 if the first is near it."""
    found = list(steps)
    low, high = min(found, default=0.0), max(found, default=1.0)
    low = 0.0 if low <= high / 10 else low
    return Axis(low, high) if high > low else Axis(low - 1 if low else 0, low + 1)
