"""The head of the page: for each run a sentence that a person might write, and its key figures."""

from collections.abc import Iterator, Sequence

from fastdiff.evaluation.report.history import known
from fastdiff.evaluation.report.markup import MISSING, counted, figure, name, percent, rounded, text
from fastdiff.evaluation.report.quality import average
from fastdiff.evaluation.report.run import Run
from fastdiff.runtime.words import duration

_STATES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped early",
    "not started": "no update yet",
    "ended": "not running",
}


def card(run: Run, number: int, several: bool) -> str:
    """A run's name, state, sentence and key figures."""
    state = run.state
    facts = "".join(f"<div><dt>{text(title)}</dt><dd>{value}</dd></div>" for title, value in _facts(run))
    notes = "".join(f"<li>{text(problem)}</li>" for problem in run.problems)
    problems = f'<ul class="problems">{notes}</ul>' if notes else ""
    title = f'<h2><span class="key c{number}"></span> {name(run.name)}' if several else "<h2>In short"
    return (
        f'<article class="card"><header>{title}</h2><span class="state {state.replace(" ", "-")}">'
        f"{text(_STATES[state])}</span></header>\n{_progress(run)}<p>{_sentence(run)}</p>\n{problems}"
        f"<dl>{facts}</dl></article>\n"
    )


def _progress(run: Run) -> str:
    if run.steps is None or run.step is None:
        return ""
    words = f"step {run.step:,} of {run.steps:,}"
    return f'<div class="progress"><progress max="{run.steps}" value="{run.step}">{words}</progress> {words}</div>\n'


def _sentence(run: Run) -> str:
    """The run in words: what the model is, what it saw, how long it took, and how good it is."""
    return " ".join(
        f"{sentence}." for sentence in (_trained(run), _result(run), _held_out(run), _best(run)) if sentence
    )


def _model(run: Run) -> str:
    model = run.part("model")
    size, small = model.get("image_size"), model.get("small_size")
    images = f"{size}×{size} images" if type(size) is int else "images"
    count = f" ({_millions(run.parameters)} parameters)" if run.parameters else ""
    if run.classifies:
        noisy = "noisy " if run.part("train").get("noised", True) is True else ""
        classes = f" in {counted(len(run.class_names), 'class', 'classes')}" if run.class_names else ""
        return f"A classifier of {noisy}{images}{classes}{count}"
    if type(small) is int:
        return f"A super-resolution model from {small}×{small} to {images}{count}"
    kind = "class-conditional diffusion model" if model.get("class_cond") is True else "diffusion model"
    return f"A {kind} for {images}{count}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"


def _trained(run: Run) -> str:
    """The model, its data, and how far it was trained."""
    if not run.config and not run.history.rows:
        return "Nothing is known of this run but its checkpoints" if run.step is not None else "Nothing is known"
    about = text(_model(run))
    if run.images:
        classes = f" of {counted(len(run.class_names), 'class', 'classes')}" if run.class_names else ""
        about += f", trained on {counted(run.images, 'image')}{'' if run.classifies else classes}"
    if run.step is None:
        return f"{about}: no update was logged or saved yet"
    took = f" in {duration(run.history.seconds)}" if run.history.seconds else ""
    where = run.part("environment").get("device")
    on = f" on {text(where)}" if isinstance(where, str) and where else ""
    batch = run.part("train").get("batch_size")
    each = f" of {counted(batch, 'image')}" if type(batch) is int else ""
    done = {"running": "so far ", "stopped": "stopped after "}.get(run.state, "")
    of = f" of {run.steps:,}" if run.steps and run.state != "finished" else ""
    return f"{about}: {done}{run.step:,}{of} updates{each}{took}{on}"


def _result(run: Run) -> str:
    losses = [value for _, value in known(run.history.median("loss"))]
    if not losses:
        return ""
    shares = [value for _, value in known(run.history.median("acc1"))]
    right = f", with {percent(shares[-1])} of the images put into their class" if shares else ""
    was = f", down from {rounded(losses[0])}" if losses[-1] < losses[0] else ""
    verb = "is at" if run.state == "running" else "ended at"
    return f"The loss {verb} {rounded(losses[-1])}{was}{right}"


def _held_out(run: Run) -> str:
    column = "val_acc1" if run.history.has("val_acc1") else "val_loss"
    there = known(run.history.points(column))
    if not there:
        return ""
    if column == "val_acc1":
        return f"On held-out images the accuracy is {percent(there[-1][1])}"
    lowest = min(there, key=lambda point: point[1])
    rises = f", after {rounded(lowest[1])} at step {figure(lowest[0])}" if lowest[0] != there[-1][0] else ""
    return f"On held-out images the loss is {rounded(there[-1][1])}{rises}"


def _best(run: Run) -> str:
    if run.best is None:
        return ""
    best = run.best
    return (
        f"Its best checkpoint is that of step {figure(best.step)} ({text(average(best.rate))}): "
        f"{name(best.name)} {figure(best.value)}"
    )


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    history, last = run.history, run.history.last
    if "loss" in last:
        yield "last loss", figure(last["loss"])
    if run.best is not None:
        yield f"best {run.best.metric}", figure(run.best.value)
    if history.seconds:
        yield "training time", text(duration(history.seconds))
        yield "images per second", rounded(last["samples"] / history.seconds) if "samples" in last else MISSING
    if "samples" in last:
        yield "images seen", figure(last["samples"])
        if run.images:
            yield "passes over the data", figure(round(last["samples"] / run.images, 1))
    if history.rows:
        yield "skipped updates", figure(history.total("skipped"))
    if run.log.last:
        yield "last logged", text(run.log.last)


def headline(runs: Sequence[Run]) -> str:
    """The title of the page."""
    return name(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs compared"
