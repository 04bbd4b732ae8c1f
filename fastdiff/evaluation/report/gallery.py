"""The pictures of the runs: previews over the steps as a slider, and samples that enlarge."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.evaluation.report.markup import counted, name, text
from fastdiff.evaluation.report.pictures import (
    SETS,
    Picture,
    SampleSet,
    Strip,
    find_previews,
    find_samples,
    read_set,
    read_strip,
)
from fastdiff.evaluation.report.quality import average
from fastdiff.evaluation.report.run import Run
from fastdiff.sampling.output import GAP

_FOR_PREVIEWS, _FOR_SAMPLES = 5_500_000, 2_500_000
"""Bytes of the page for each kind of picture."""

_IN_GRID, _COLUMNS = 16, 4
"""The images of a preview and its columns."""

_PRINTED = 4


@dataclass(frozen=True)
class Gallery:
    """The sections of previews and of samples as HTML, "" if there are none, and the number of embedded previews."""

    previews: str
    samples: str
    count: int


def read_gallery(runs: Sequence[Run]) -> Gallery:
    """Read the pictures of the runs."""
    strips = _strips(runs)
    count = sum(len(strip.shown) for run in strips for strip in run)
    return Gallery(_previews(runs, strips), _samples(runs), count)


def _strips(runs: Sequence[Run]) -> list[list[Strip]]:
    """The previews of each run by average; none of a folder that cannot be read."""
    found = []
    for run in runs:
        try:
            found.append(find_previews(run.folder))
        except OSError:
            found.append({})
    share = _FOR_PREVIEWS // max(sum(map(len, found)), 1)
    return [[read_strip(rate, paths, share) for rate, paths in run.items()] for run in found]


def _previews(runs: Sequence[Run], strips: Sequence[Sequence[Strip]]) -> str:
    rates = sorted({strip.rate for run in strips for strip in run if strip.shown}, reverse=True)
    steps = sorted({step for run in strips for strip in run for step in strip.shown})
    if not steps:
        unread = any(strip.unreadable for run in strips for strip in run)
        return '<section id="previews"><h2>Previews</h2><p>None could be read.</p></section>\n' if unread else ""
    choices = "".join(
        f'<label><input type="radio" name="average" value="{rate!r}"{" checked" if i == 0 else ""}> '
        f"{text(average(rate))}</label> "
        for i, rate in enumerate(rates)
    )
    ticks = " ".join(map(str, steps))
    boxes = "".join(_box(run, i, strips[i], rates[0], len(runs) > 1) for i, run in enumerate(runs))
    return (
        '<section id="previews"><h2>Previews</h2>\n'
        f'<div class="controls" hidden><fieldset><legend>Weights</legend>{choices}</fieldset>\n'
        f'<label class="slide">Step <output>{steps[-1]:,}</output><input type="range" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) - 1}" data-steps="{ticks}"></label></div>\n'
        f'<div class="boxes">\n{boxes}</div></section>\n'
    )


def _box(run: Run, number: int, strips: Sequence[Strip], rate: float, several: bool) -> str:
    """The previews of a run, of which the script shows one, a printer and a page without scripts a few."""
    title = f'<h3><span class="key c{number}"></span> {name(run.name)}</h3>\n' if several else ""
    if not any(strip.shown for strip in strips):
        return f'<div class="box">{title}<p class="quiet">This run has no previews.</p></div>\n'
    parts, notes = [], []
    for strip in strips:
        shown = sorted(strip.shown)
        printed = {shown[round(i * (len(shown) - 1) / (_PRINTED - 1))] for i in range(_PRINTED)} if shown else set()
        for step, picture in sorted(strip.shown.items()):
            chosen = (" print" if strip.rate == rate and step in printed else "") + (
                " on" if strip.rate == rate and step == shown[-1] else ""
            )
            parts.append(
                f'<figure class="preview{chosen}" data-rate="{strip.rate!r}" data-step="{step}">'
                f'<img src="{picture.uri}" width="{picture.width}" height="{picture.height}" '
                f'alt="Preview of {text(run.name)} at step {step}, {text(average(strip.rate))}">'
                f"<figcaption>step {step:,}, {text(average(strip.rate))}</figcaption></figure>\n"
            )
        notes += [note] if (note := _note(strip)) else []
    first = next(picture for strip in strips for picture in strip.shown.values())
    said = f'<p class="quiet">{text("; ".join(notes))}</p>' if notes else ""
    empty = '<p class="quiet none" hidden>No preview of these weights.</p>'
    return f'<div class="box">{title}{_names(run, first)}<div class="stack">{"".join(parts)}{empty}</div>{said}</div>\n'


def _names(run: Run, picture: Picture) -> str:
    """The classes of a preview's images, unless the picture itself has them, as those of older runs have not."""
    classes, size = run.class_names, run.part("model").get("image_size")
    labelled = bool(classes) and run.part("model").get("class_cond") is True
    bare = (
        type(size) is int and picture.width == picture.height and picture.width % (_COLUMNS * (size + GAP) + GAP) == 0
    )
    if not labelled or not bare:
        return ""
    cells = [classes[i % len(classes)] for i in range(_IN_GRID)]
    if all(cell == cells[i % _COLUMNS] for i, cell in enumerate(cells)):
        cells = cells[:_COLUMNS]
    said = "".join(f'<span title="{text(cell)}">{name(cell)}</span>' for cell in cells)
    return f'<div class="names" role="note" aria-label="Classes of the images, row by row">{said}</div>\n'


def _note(strip: Strip) -> str:
    """What of an average's previews is left out or encoded anew; empty if nothing is."""
    parts = []
    if len(strip.shown) < strip.found - strip.unreadable:
        parts.append(f"{len(strip.shown)} of {counted(strip.found, 'preview')} are shown")
    if strip.unreadable:
        parts.append(f"{strip.unreadable} could not be read")
    if any(picture.lossy for picture in strip.shown.values()):
        parts.append("encoded anew as JPEG to keep the page small")
    return f"{average(strip.rate)}: {', '.join(parts)}" if parts else ""


def _samples(runs: Sequence[Run]) -> str:
    found = [find_samples(run.folder) for run in runs]
    kept = [paths[:SETS] for paths in found]
    share = _FOR_SAMPLES // max(sum(map(len, kept)), 1)
    parts = []
    for i, run in enumerate(runs):
        sets = [read_set(path, run.class_names, share) for path in kept[i]]
        left = [f"{one.name}: {one.problem}" for one in sets if one.problem]
        if (more := len(found[i]) - len(kept[i])) > 0:
            left.append(f"{counted(more, 'older file')} of samples")
        grids = "".join(_grid(one, run, i, len(runs) > 1) for one in sets if one.shown)
        said = f'<p class="quiet">Left out: {text("; ".join(left), 1000)}</p>' if left else ""
        parts.append(f"{grids}{said}\n" if grids or said else "")
    body = "".join(parts)
    return f'<section id="samples"><h2>Samples</h2>\n{body}</section>\n' if body else ""


def _grid(one: SampleSet, run: Run, number: int, several: bool) -> str:
    cells = []
    for i, picture in enumerate(one.shown):
        label = one.classes[i] if one.classes else ""
        told = f"image {i + 1}" + (f", {label}" if label else "")
        caption = f"<span>{name(label)}</span>" if label else ""
        cells.append(
            f'<button type="button" title="{text(told)}"><img src="{picture.uri}" width="{picture.width}" '
            f'height="{picture.height}" alt="{text(told)}">{caption}</button>'
        )
    who = f'<span class="key c{number}"></span> {name(run.name)}: ' if several else ""
    count = f"the first {len(one.shown)} of {one.count:,}" if len(one.shown) < one.count else f"{one.count}"
    lossy = ", encoded anew as JPEG" if any(picture.lossy for picture in one.shown) else ""
    return (
        f'<h3>{who}{name(one.name)}</h3><p class="quiet">{count} images{lossy}; each enlarges on a click.</p>\n'
        f'<div class="grid">{"".join(cells)}</div>\n'
    )
