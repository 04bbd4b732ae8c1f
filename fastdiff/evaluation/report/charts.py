"""Charts as inline SVG that is stretched to the width of its place, with labels beside it in HTML."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fastdiff.evaluation.report.axes import Axis
from fastdiff.evaluation.report.history import Point, known
from fastdiff.evaluation.report.markup import text

_HEIGHT = 100_000
_MOST_UNITS = 2_000_000

RAW, SMOOTH, HELD_OUT, DOTS = "raw", "smooth", "held", "dots"
"""Kinds of lines: every value, their median nearby, values on held-out images, and few values with a dot each."""


@dataclass(frozen=True)
class Line:
    """A line of run number ``run``: points by increasing step. ``label`` says what it is where the chart is read out.

    ``spread`` are deviations of the points by step, drawn as whiskers; ``dash`` tells lines of one run apart.
    """

    run: int
    label: str
    points: Sequence[Point]
    kind: str = RAW
    spread: Mapping[float, float] = field(default_factory=dict)
    dash: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis of steps.

    ``skips`` are a run and the steps at which it skipped updates, ``rings`` a run, a step and a value to point out.
    ``said`` describes the chart for those who cannot see it, ``summary`` is HTML below it. ``small`` has fewer ticks.
    """

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    note: str = ""
    said: str = ""
    summary: str = ""
    skips: Sequence[tuple[int, Sequence[float]]] = ()
    rings: Sequence[tuple[int, float, float]] = ()
    small: bool = False
    wide: bool = False

    def html(self) -> str:
        """The chart as a figure."""
        unit = max(1, -(-int(self.x.high - self.x.low) // _MOST_UNITS))
        width = max(1, round((self.x.high - self.x.low) / unit))
        kinds = " ".join(["chart", *(["small"] if self.small else []), *(["wide"] if self.wide else [])])
        scale = "log" if self.y.log else "percent" if self.y.percent else "linear"
        note = f' <span class="note">{text(self.note)}</span>' if self.note else ""
        summary = f'<p class="sum">{self.summary}</p>' if self.summary else ""
        return (
            f'<figure class="{kinds}"><figcaption><span class="title">{text(self.title)}</span>{note}</figcaption>\n'
            f'<div class="plot" tabindex="0" role="img" aria-label="{text(self._read_out(), 2000)}" '
            f'data-x="{self.x.low:.10g} {unit} {width}" data-y="{self.y.low!r} {self.y.high!r} {scale}">'
            f'<svg viewBox="0 0 {width} {_HEIGHT}" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
            f"{''.join(self._shapes(width))}</svg>{''.join(self._labels())}</div>"
            f"{summary}</figure>\n"
        )

    def _read_out(self) -> str:
        return ". ".join(filter(None, (self.title, self.note, self.said)))

    def _shapes(self, width: int) -> Iterable[str]:
        for tick in self.y.ticks(3 if self.small else 5):
            yield f'<path class="grid" d="M0,{self._y(tick)}H{width}"/>'
        for run, steps in self.skips:
            places = "".join(f"M{self._x(step, width)},{_HEIGHT}v{-_HEIGHT // 16}" for step in steps)
            yield f'<path class="skip c{run}" d="{places}"/>' if places else ""
        for line in self.lines:
            whiskers = self._whiskers(line, width)
            if whiskers:
                yield f'<path class="whisker c{line.run}" d="{whiskers}"/>'
            dash = f" d{line.dash}" if line.dash else ""
            yield (
                f'<path class="{line.kind} c{line.run}{dash}" data-n="{text(line.label)}" '
                f'd="{self._path(line.points, width)}"/>'
            )
            if line.kind in (DOTS, HELD_OUT):
                dots = "".join(f"M{self._x(x, width)},{self._y(y)}h0" for x, y in known(line.points))
                yield f'<path class="dot c{line.run}" d="{dots}"/>'
        for run, step, value in self.rings:
            ring = f"M{self._x(step, width)},{self._y(value)}h0"
            yield f'<path class="ring c{run}" d="{ring}"/><path class="hole c{run}" d="{ring}"/>'

    def _labels(self) -> Iterable[str]:
        for tick in self.y.ticks(3 if self.small else 5):
            yield f'<span class="y" style="top:{100 * (1 - self.y.place(tick)):.2f}%">{text(self.y.label(tick))}</span>'
        for tick in self.x.ticks(3 if self.small else 5):
            place = 100 * self.x.place(tick)
            end = " end" if place > 94 else ""
            yield f'<span class="x{end}" style="left:{place:.2f}%">{text(self.x.label(tick))}</span>'

    def _x(self, step: float, width: int) -> int:
        return round(self.x.place(step) * width)

    def _y(self, value: float) -> int:
        return round((1 - min(max(self.y.place(value), -1), 2)) * _HEIGHT)

    def _path(self, points: Sequence[Point], width: int) -> str:
        """The line in relative steps, which are short; it begins anew after a gap."""
        parts: list[str] = []
        at: tuple[int, int] | None = None
        for step, value in points:
            if value is None or (self.y.log and value <= 0):
                at = None
                continue
            here = (self._x(step, width), self._y(value))
            if at is None:
                parts.append(f"M{here[0]},{here[1]}h0")  # a point alone is a dot
            else:
                parts.append(f"l{here[0] - at[0]},{here[1] - at[1]}")
            at = here
        return "".join(parts)

    def _whiskers(self, line: Line, width: int) -> str:
        there = ((x, y, line.spread[x]) for x, y in known(line.points) if x in line.spread)
        return "".join(f"M{self._x(x, width)},{self._y(y - d)}V{self._y(y + d)}" for x, y, d in there)
