"""The page: its parts in order, with the style sheet, the script and the policy that forbids the network."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.resources import files

from fastdiff.evaluation.report.curves import curves
from fastdiff.evaluation.report.gallery import Gallery
from fastdiff.evaluation.report.markup import counted, name, setting, text
from fastdiff.evaluation.report.quality import quality
from fastdiff.evaluation.report.run import Run
from fastdiff.evaluation.report.settings import environment, settings
from fastdiff.evaluation.report.summary import card, headline

_CLASSES = 40
"""Classes that are listed with their counts; more are folded."""

_COLOURS = 8
"""Colours in page.css; more runs use them again."""

_NAV = {
    "curves": "Curves",
    "quality": "Sample metrics",
    "previews": "Previews",
    "samples": "Samples",
    "settings": "Settings",
    "data": "Data",
    "environment": "Environment",
    "log": "Warnings",
}


def page(runs: Sequence[Run], gallery: Gallery) -> Iterator[str]:
    """The page in pieces."""
    parts = [
        curves(runs),
        quality(runs),
        gallery.previews,
        gallery.samples,
        settings(runs),
        _data(runs),
        environment(runs),
        _log(runs),
    ]
    colours = "\n".join(f".c{i} {{ --c: var(--p{i % _COLOURS}); }}" for i in range(len(runs)))
    style, script = f"{_read('page.css')}{colours}\n", _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = f"{runs[0].name} · fastdiff" if len(runs) == 1 else f"{len(runs)} runs · fastdiff"
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
    )
    nav = " ".join(
        f'<a href="#{key}">{text(title)}</a>'
        for key, title in _NAV.items()
        if any(part.startswith(f'<section id="{key}"') for part in parts)
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield (
        f'<header class="top"><p class="quiet">Training report, {written}</p>\n<h1>{headline(runs)}</h1>\n'
        f'<nav aria-label="Sections">{nav}</nav></header>\n<main>\n<div class="cards">\n'
    )
    for number, run in enumerate(runs):
        yield card(run, number, len(runs) > 1)
    yield "</div>\n"
    yield from parts
    yield f'</main>\n<div id="tip" role="status" hidden></div>\n{_DIALOG}<script>{script}</script>\n</body>\n</html>\n'


_DIALOG = (
    '<dialog id="zoom" aria-label="Enlarged image"><img alt=""><p></p>'
    '<div><button type="button" value="-1">Previous</button><button type="button" value="1">Next</button>'
    '<button type="button" value="0">Close</button></div></dialog>\n'
)


def _read(file: str) -> str:
    return files(__package__).joinpath(file).read_text(encoding="utf-8")


def _data(runs: Sequence[Run]) -> str:
    """The section about the data: once if all runs have the same."""
    sheets = [_sheet(run) for run in runs]
    if not any(sheets):
        return ""
    if len(set(sheets)) == 1:
        shared = '<p class="quiet">All runs were trained on the same data.</p>' if len(runs) > 1 else ""
        body = shared + sheets[0]
    else:
        body = "".join(
            f'<h3><span class="key c{i}"></span> {name(run.name)}</h3>{sheet or "<p>Nothing is known.</p>"}'
            for i, (run, sheet) in enumerate(zip(runs, sheets, strict=True))
        )
    return f'<section id="data"><h2>Data</h2>\n{body}</section>\n'


def _sheet(run: Run) -> str:
    data, train = run.part("data"), run.part("train")
    facts = {
        "images": f"{run.images:,}" if run.images else None,
        "folder": data.get("data_dir"),
        "classes": f"{len(run.class_names):,}" if run.class_names else None,
        "labels": (data.get("label_file") or data.get("labels")) if run.class_names else None,
        "mirrored": data.get("flip"),
        "held out": train.get("val_data_dir") or train.get("holdout") or None,
        "fingerprint": run.config.get("data_fingerprint"),
        "found": run.log.line("data"),
        "held-out images": run.log.line("held out"),
    }
    rows = "".join(
        f'<tr><th scope="row">{text(key)}</th><td>{text(setting(value))}</td></tr>'
        for key, value in facts.items()
        if value not in (None, "", [])
    )
    if not rows:
        return ""
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>\n{_classes(run)}'


def _classes(run: Run) -> str:
    """The images of each class as bars; folded if they are many."""
    if not run.class_counts or len(run.class_counts) != len(run.class_names):
        return ""
    most = max(max(run.class_counts), 1)
    bars = "".join(
        f'<tr><th scope="row">{name(title)}</th><td class="num">{count:,}</td>'
        f'<td class="bar"><span style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for title, count in zip(run.class_names, run.class_counts, strict=True)
    )
    table = f'<table class="bars"><tbody>{bars}</tbody></table>'
    if len(run.class_counts) <= _CLASSES:
        return table
    least, total = min(run.class_counts), counted(len(run.class_counts), "class", "classes")
    return f"<details><summary>{total} of {least:,} to {most:,} images</summary>{table}</details>"


def _log(runs: Sequence[Run]) -> str:
    """The last warnings of the logs, folded."""
    parts = []
    for i, run in enumerate(runs):
        if run.log.warnings:
            who = f'<h3><span class="key c{i}"></span> {name(run.name)}</h3>' if len(runs) > 1 else ""
            last = f", the last {len(run.log.warnings)}" if run.log.warned > len(run.log.warnings) else ""
            lines = "".join(f"<li>{text(line)}</li>" for line in run.log.warnings)
            parts.append(
                f"{who}<details><summary>{counted(run.log.warned, 'warning')}{last}</summary><ul>{lines}</ul></details>"
            )
    return f'<section id="log"><h2>Warnings in the log</h2>\n{"".join(parts)}</section>\n' if parts else ""
