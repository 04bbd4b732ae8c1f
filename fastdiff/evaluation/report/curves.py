"""The curves of training: losses, by quarter of the timesteps too, gradient norm, learning rate and speed."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from fastdiff.evaluation.report.axes import Axis, horizontal, vertical
from fastdiff.evaluation.report.charts import HELD_OUT, RAW, SMOOTH, Chart, Line
from fastdiff.evaluation.report.history import SMOOTHED, known
from fastdiff.evaluation.report.markup import counted, figure, name, percent, rounded, text
from fastdiff.evaluation.report.run import Run

_TERMS = {
    "loss": ("Loss", ""),
    "mse": ("Mean squared error", "mse, of the prediction"),
    "vb": ("Variational bound", "vb, what trains the variance"),
    "acc1": ("Accuracy", "acc1, share of images in their class"),
    "acc5": ("Accuracy among five", "acc5, class among the five likeliest"),
}
_SHARES = ("acc1", "acc5")
_QUARTERS = ("0–25% of the timesteps, least noise", "25–50%", "50–75%", "75–100%, most noise")
_OTHERS = {
    "grad_norm": ("Gradient norm", True, False),
    "lr": ("Learning rate", False, False),
    "images_per_s": ("Images per second", False, False),
    "data_wait": ("Waiting for data", False, True),
    "lg_loss_scale": ("Loss scale of fp16, as log2", False, False),
}
"""Columns of the optimizer and of the speed: title, whether on a logarithmic scale, and whether it is a share."""
_STEPS_NAMED = 8


def curves(runs: Sequence[Run]) -> str:
    """The section of curves; empty if no run has any."""
    there = [run for run in runs if run.history.last]
    if not there:
        return ""
    x = horizontal(step for run in there for step in _ends(run))
    terms = [term for term in _TERMS if _differs(runs, term)]
    blocks = "".join(_block(runs, x, term, wide=term == terms[0] and len(terms) != 2) for term in terms)
    others = "".join(chart.html() for chart in _others(runs, x))
    skipped = "".join(_skipped(run, i, len(runs) > 1) for i, run in enumerate(runs))
    return (
        f'<section id="curves"><h2>Curves</h2>\n{_legend(runs)}<div class="terms">\n{blocks}</div>\n'
        f'{skipped}<div class="charts">\n{others}</div>\n</section>\n'
    )


def _ends(run: Run) -> tuple[float, float]:
    steps = [step for column in ("lr", "loss", "grad_norm") for step, _ in run.history.points(column)]
    last = float(run.history.last["step"])
    return min(steps, default=last), max([*steps, last])


def _differs(runs: Sequence[Run], term: str) -> bool:
    """Whether a term is there and says something of its own: an mse may be the loss, an accuracy always 1."""
    histories = [run.history for run in runs if run.history.has(term) or run.history.has(f"val_{term}")]
    if term == "mse":
        return any(h.has("vb") or known(h.points("mse")) != known(h.points("loss")) for h in histories)
    if term == "acc5":
        return any(value != 1 for h in histories for _, value in (*h.points(term), *h.points(f"val_{term}")))
    return bool(histories)


def _legend(runs: Sequence[Run]) -> str:
    """What the colours and the lines mean; a run can be hidden if there are several."""
    keys = "".join(
        f'<label><input type="checkbox" checked data-run="{i}"><span class="key c{i}"></span>{name(run.name)}</label> '
        for i, run in enumerate(runs)
    )
    held = any(run.history.has(f"val_{term}") for run in runs for term in _TERMS)
    lines = ["thin: as logged" + (", of several rows the extremes" if any(run.history.thinned for run in runs) else "")]
    lines.append(f"bold: running median of {SMOOTHED:.0%} of the rows, at least 5")
    lines += ["dots: on held-out images"] if held else []
    several = f'<div class="legend">{keys}</div>\n' if len(runs) > 1 else ""
    return f'{several}<p class="how">{" · ".join(lines)}</p>\n'


def _block(runs: Sequence[Run], x: Axis, term: str, wide: bool) -> str:
    """The chart of a term, and a row of four of its quarters over one axis."""
    title, note = _TERMS[term]
    whole = _term(runs, x, term, term, title, note, wide=wide)
    quarters = [f"{term}_q{q}" for q in range(4)]
    small = ""
    if any(run.history.has(column) for run in runs for column in quarters):
        y = _scale(runs, quarters, term in _SHARES)
        charts = (_term(runs, x, term, c, t, "", y) for c, t in zip(quarters, _QUARTERS, strict=True))
        small = f'<div class="quarters">\n{"".join(chart.html() for chart in charts)}</div>\n'
    return f'<div class="term{" wide" if wide else ""}">\n{whole.html()}{small}</div>\n'


def _scale(runs: Sequence[Run], columns: Sequence[str], shares: bool) -> Axis:
    lists = (run.history.points(f"{val}{column}") for run in runs for column in columns for val in ("", "val_"))
    values = (value for _, value in known(chain.from_iterable(lists)))
    return vertical(values, log=not shares, from_zero=shares, percent=shares)


def _term(
    runs: Sequence[Run],
    x: Axis,
    term: str,
    column: str,
    title: str,
    note: str,
    y: Axis | None = None,
    *,
    wide: bool = False,
) -> Chart:
    """The chart of a term or of a quarter of it, which shares an axis ``y`` with the others."""
    small, write = y is not None, percent if term in _SHARES else rounded
    y = y or _scale(runs, [column], term in _SHARES)
    lines = list(_lines(runs, column))
    for i, run in enumerate(runs):
        if run.history.has(f"val_{column}"):
            lines.append(Line(i, _label(runs, run, "held out"), run.history.points(f"val_{column}"), HELD_OUT))
    best = max if term in _SHARES else min
    told = [(i, _told(run, column, write, best)) for i, run in enumerate(runs)]
    return Chart(
        title,
        x,
        y,
        lines,
        note=f"{note}{', ' if note and y.log else ''}{'logarithmic' if y.log else ''}" if not small else "",
        said="; ".join(f"{runs[i].name}: {words}" for i, words in told if words),
        summary="" if small else _summary(runs, told),
        skips=[] if small else [(i, [step for step, _ in run.history.sums("skipped")]) for i, run in enumerate(runs)],
        small=small,
        wide=wide,
    )


def _lines(runs: Sequence[Run], column: str) -> Iterable[Line]:
    for i, run in enumerate(runs):
        if run.history.has(column):
            yield Line(i, _label(runs, run, "logged"), run.history.points(column), RAW)
    for i, run in enumerate(runs):
        if run.history.has(column):
            yield Line(i, _label(runs, run, "median"), run.history.median(column), SMOOTH)


def _label(runs: Sequence[Run], run: Run, kind: str) -> str:
    """What a line is, with the run's name if there are several."""
    return f"{run.name}, {kind}" if len(runs) > 1 else kind


def _told(run: Run, column: str, write: Callable[[float], str], best: Callable[..., tuple[float, float]]) -> str:
    """The last and the best value of the smoothed line, and of the held-out images."""
    parts = []
    extreme = "highest" if best is max else "lowest"
    for told, points in (("", run.history.median(column)), ("held out ", run.history.points(f"val_{column}"))):
        if there := known(points):
            (end, last), (step, value) = there[-1], best(there, key=lambda point: point[1])
            where = f"its {extreme}" if value == last else f"{extreme} {write(value)} at step {figure(round(step))}"
            parts.append(f"{told}{write(last)} at the end, {where}" if end != there[0][0] else f"{told}{write(last)}")
    return "; ".join(parts)


def _summary(runs: Sequence[Run], told: Sequence[tuple[int, str]]) -> str:
    several = len(runs) > 1
    keys = {i: f'<span class="key c{i}"></span> ' if several else "" for i, _ in told}
    return "<br>".join(f'<span class="c{i}">{keys[i]}{text(words)}</span>' for i, words in told if words)


def _others(runs: Sequence[Run], x: Axis) -> Iterable[Chart]:
    """The charts of the optimizer and of the speed."""
    for column, (title, log, share) in _OTHERS.items():
        if not any(run.history.has(column) for run in runs):
            continue
        write = percent if share else rounded
        lines = list(_lines(runs, column))
        if column in ("lr", "lg_loss_scale"):  # they are smooth
            lines = [Line(line.run, line.label, line.points, SMOOTH) for line in lines if line.kind == RAW]
        values = [value for line in lines for _, value in known(line.points)]
        y = vertical(values, log=log, from_zero=not log, percent=share)
        told = []
        for i, run in enumerate(runs):
            points = [value for _, value in known(run.history.points(column))]
            if points:
                low, high, last = write(min(points)), write(max(points)), write(points[-1])
                told.append((i, f"{low} to {high}, last {last}" if low != high else f"{last} throughout"))
        skips = [(i, [step for step, _ in run.history.sums("skipped")]) for i, run in enumerate(runs)]
        yield Chart(
            title,
            x,
            y,
            lines,
            note="share of the time" if share else "logarithmic" if y.log else "",
            said="; ".join(f"{runs[i].name}: {words}" for i, words in told),
            summary=_summary(runs, told),
            skips=skips if column == "grad_norm" else [],
        )


def _skipped(run: Run, number: int, several: bool) -> str:
    """A line about the updates that a run skipped, which the charts mark; empty if there are none."""
    skips = run.history.sums("skipped")
    total = round(sum(count for _, count in skips))
    if not total:
        return ""
    steps = ", ".join(figure(step) for step, _ in skips[:_STEPS_NAMED]) + (", …" if len(skips) > _STEPS_NAMED else "")
    who = f'<span class="key c{number}"></span> {name(run.name)}: ' if several else ""
    where = "marked below the curves; logged at step" + ("s" if len(skips) > 1 else "")
    return f'<p class="skips">{who}{counted(total, "update was", "updates were")} skipped, {where} {text(steps)}.</p>\n'
