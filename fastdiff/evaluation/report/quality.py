"""Sample metrics over the saved steps: a chart per figure, and a table."""

from collections.abc import Callable, Sequence
from typing import Any

from fastdiff.config import Metric
from fastdiff.evaluation.report.axes import horizontal, vertical
from fastdiff.evaluation.report.charts import DOTS, Chart, Line
from fastdiff.evaluation.report.history import known
from fastdiff.evaluation.report.markup import MISSING, figure, name, text
from fastdiff.evaluation.report.run import Measured, Run

_DEVIATION = "_deviation"
_ROWS = 200

_Key = tuple[str, str]
"""A figure's key and full name: figures of different names do not compare."""


def quality(runs: Sequence[Run]) -> str:
    """The section of sample metrics; empty if nothing was measured."""
    if not any(run.measured for run in runs):
        return ""
    keys = dict.fromkeys(key for run in runs for one in run.measured for key in _keys(one))
    steps = {one.step for run in runs for one in run.measured}
    charts = "".join(_chart(runs, key, steps).html() for key in keys) if len(steps) > 1 else ""
    return (
        '<section id="quality"><h2>Sample metrics</h2>\n'
        f'<div class="charts">\n{charts}</div>\n{_table(runs, list(keys))}</section>\n'
    )


def _keys(one: Measured) -> list[_Key]:
    return [(key, one.names.get(key, key)) for key in one.figures if not key.endswith(_DEVIATION)]


def _better(key: str) -> Callable[..., Any] | None:
    """What picks the best of a figure's values, min or max; None for a figure that this version does not know."""
    try:
        return min if Metric(key).lower_is_better else max
    except ValueError:
        return None


def average(rate: float) -> str:
    """The name of an average of the weights."""
    return f"EMA {rate:g}" if rate else "raw weights"


def _drawn(one: Measured) -> str:
    """How the samples were drawn, as far as checkpoints compare only if it is the same."""
    parts = [str(one.samples[key]) for key in ("sampler",) if one.samples.get(key) is not None]
    parts += [f"{one.samples['steps']} steps"] if one.samples.get("steps") is not None else []
    scale = one.samples.get("guidance_scale")
    if scale not in (None, 1, 1.0):
        interval = one.samples.get("guidance_interval")
        parts.append(f"guidance {scale}" + (f" from {interval[0]:g} to {interval[1]:g}" if interval else ""))
    return ", ".join(parts)


def _series(runs: Sequence[Run]) -> dict[tuple[int, float, str], list[Measured]]:
    """The evaluations by run, average and way of drawing, each by step."""
    found: dict[tuple[int, float, str], list[Measured]] = {}
    for i, run in enumerate(runs):
        for one in sorted(run.measured, key=lambda one: one.step):
            found.setdefault((i, one.rate, _drawn(one)), []).append(one)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])))


def _chart(runs: Sequence[Run], key: _Key, steps: set[int]) -> Chart:
    lines: list[Line] = []
    series = _series(runs)
    ways = {drawn for _, _, drawn in series}
    dashes: dict[int, int] = {}
    for (i, rate, drawn), there in series.items():
        # A step that was measured twice counts as it was measured last.
        at = {
            one.step: one for one in there if (key[0], one.names.get(key[0], key[0])) == key and key[0] in one.figures
        }
        if not at:
            continue
        points = [(float(step), one.figures[key[0]]) for step, one in at.items()]
        spread = {float(step): d for step, one in at.items() if (d := one.figures.get(key[0] + _DEVIATION)) is not None}
        parts = (runs[i].name if len(runs) > 1 else "", average(rate), drawn if len(ways) > 1 else "")
        label = ", ".join(filter(None, parts))
        lines.append(Line(i, label, points, DOTS, spread, dashes.get(i, 0)))
        dashes[i] = dashes.get(i, 0) + 1
    spreads = ((line, x, y) for line in lines for x, y in known(line.points))
    values = [y + sign * line.spread.get(x, 0) for line, x, y in spreads for sign in (-1, 1)]
    rings = [ring for i, run in enumerate(runs) if (ring := _best(run, i, key, lines)) is not None]
    notes = [{min: "lower is better", max: "higher is better", None: ""}[_better(key[0])]]
    notes.append(("ring: the best of each run" if len(rings) > 1 else "ring: the best") if rings else "")
    keyed = "<br>".join(map(_keyed, lines))
    return Chart(
        key[1],
        horizontal(steps),
        vertical(values),
        lines,
        note=", ".join(filter(None, notes)),
        said="; ".join(f"best of {runs[i].name}: {figure(value)} at step {figure(step)}" for i, step, value in rings),
        summary=keyed,
        rings=rings,
    )


def _keyed(line: Line) -> str:
    """A line of the chart's legend, with the line's last value."""
    step, value = line.points[-1]
    return (
        f'<span class="c{line.run}"><svg class="sample" viewBox="0 0 26 8" aria-hidden="true">'
        f'<path class="dots c{line.run} d{line.dash}" d="M1,4H25"/></svg> {name(line.label)}: '
        f"{figure(value)} at step {figure(step)}</span>"
    )


def _best(run: Run, number: int, key: _Key, lines: Sequence[Line]) -> tuple[int, float, float] | None:
    """The best point of a run: as best.json says if it is about this figure, else the lowest or highest."""
    best = run.best
    points = [(value, step) for line in lines if line.run == number for step, value in known(line.points)]
    if best is not None and (best.metric, best.name) == key and (best.value, best.step) in points:
        return number, best.step, best.value
    if len(points) < 2 or (better := _better(key[0])) is None:
        return None
    value, step = better(points)
    return number, step, value


def _table(runs: Sequence[Run], keys: Sequence[_Key]) -> str:
    rows = [
        (i, one) for i, run in enumerate(runs) for one in sorted(run.measured, key=lambda one: (one.step, one.rate))
    ]
    best = {key: _extreme([one.figures[key[0]] for _, one in rows if key in _keys(one)], key[0]) for key in keys}
    head = "".join(f'<th scope="col" class="num">{_in_two_lines(full)}</th>' for _, full in keys)
    body = "".join(_row(runs[i], one, keys, best, i if len(runs) > 1 else None) for i, one in rows[-_ROWS:])
    left = f"<p>The last {_ROWS} of {len(rows):,} evaluations are shown.</p>" if len(rows) > _ROWS else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of sample metrics"><table class="figures">'
        f'<thead><tr><th scope="col">checkpoint</th>{head}<th scope="col">samples</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>{left}\n"
    )


def _in_two_lines(full: str) -> str:
    """A figure's full name, with what is in brackets at its end in a line of its own."""
    short, bracket, about = full.partition(" (")
    return f"{name(short)}<small>{name(about.removesuffix(')'))}</small>" if bracket else name(full)


def _extreme(values: Sequence[float], key: str) -> float | None:
    better = _better(key)
    return better(values) if better is not None and len(values) > 1 else None


def _row(run: Run, one: Measured, keys: Sequence[_Key], best: dict[_Key, float | None], number: int | None) -> str:
    """A row of the table, with the run's key and name if it has a ``number``."""
    chosen = run.best is not None and (run.best.checkpoint, run.best.step) == (one.checkpoint, one.step)
    star = ' <span class="badge">best</span>' if chosen else ""
    who = "" if number is None else f'<span class="key c{number}"></span> {name(run.name)}, '
    cells = f'<th scope="row">{who}step {figure(one.step)}, {text(average(one.rate))}{star}</th>'
    there = _keys(one)
    for key in keys:
        value = one.figures[key[0]] if key in there else None
        strong = value is not None and value == best[key]
        spread = one.figures.get(key[0] + _DEVIATION) if value is not None else None
        words = figure(value) + (f" ± {figure(spread, 2)}" if spread is not None else "")
        cells += f'<td class="num">{f"<b>{words}</b>" if strong else words}</td>'
    count: Any = one.samples.get("count")
    drawn = ", ".join(filter(None, (f"{count:,}" if type(count) is int else "", _drawn(one))))
    return f"<tr>{cells}<td>{text(drawn or MISSING)}</td></tr>"
