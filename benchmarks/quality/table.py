"""The rows of a contest as a table in Markdown: a line per contestant, means over the seeds."""

import itertools
import math
from collections.abc import Sequence
from statistics import mean

from fastdiff.benchmarks.quality.contest import REAL
from fastdiff.benchmarks.quality.contestants import EXPLAINED
from fastdiff.benchmarks.quality.measure import NLL_IMAGES, NLL_STEPS
from fastdiff.benchmarks.rows import Values, number
from fastdiff.config import Contestant, Mode

_COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "FD": ("fd", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "FD-EfficientNet": ("fd_efficientnet", "{:.1f}"),
    "bits/dim": ("bits_per_dim", "{:.2f}"),
    "updates": ("updates", "{:,.0f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
}
"""By title: the column of a row, and how it is written."""


def markdown(rows: Sequence[Values]) -> str:
    """The rows of a contest as sections, one for each set and mode. The real images are the first line of each."""
    sections = []
    real = {row["set"]: row for row in rows if row["contestant"] == REAL}
    found = [row for row in rows if row["contestant"] != REAL]
    for (name, mode, length), group in itertools.groupby(found, lambda row: (row["set"], row["mode"], row["length"])):
        values = list(group)
        if mode == Mode.UNDONE:  # below what it is compared with
            same = {"set": name, "contestant": Contestant.AUTO, "length": length, "seed": values[0]["seed"]}
            values = [row for row in found if row["mode"] == Mode.UPDATES and same.items() <= row.items()] + values
        values = [real[name], *values] if name in real else values
        titled = f"**{name}, {length} {'minutes' if mode == Mode.TIME else 'updates'}**"
        sections.append(f"{titled}: {_how(values)}\n\n{_table(values)}")
    explained = "\n".join(f"- {contestant}: {words}." for contestant, words in EXPLAINED.items())
    return "\n\n".join([*sections, explained]) + "\n"


def _how(rows: Sequence[Values]) -> str:
    """What the figures of a section have in common, and each machine, version and commit that made one."""

    def each(column: str) -> str:
        return " and ".join(dict.fromkeys(str(row[column]) for row in rows))

    row = rows[-1]
    seeds = sorted({str(row["seed"]) for row in rows if row["contestant"] != REAL})
    counted = f"mean of the seeds {', '.join(seeds)}" if len(seeds) > 1 else f"seed {seeds[0]}"
    drawn = f"{int(number(row, 'samples')):,} samples in {row['steps']} steps of {row['sampler']}"
    if rows[0]["contestant"] == REAL and rows[0]["samples"] != row["samples"]:
        drawn += f", {int(number(rows[0], 'samples')):,} real images"
    bound = f"bits/dim of {NLL_IMAGES} held-out images in {NLL_STEPS} timesteps"
    judged = f"the judge names {number(row, 'judge_accuracy'):.1%} of held-out real images rightly"
    where = f"{each('machine')}, torch {each('torch')}, commit {each('commit')}"
    return f"{counted}; {drawn}; {bound}; {judged}; {where}."


def _table(rows: Sequence[Values]) -> str:
    contestants = list(dict.fromkeys(str(row["contestant"]) for row in rows))
    lines = []
    for contestant in contestants:
        own = [row for row in rows if row["contestant"] == contestant]
        means = {title: mean(number(row, column) for row in own) for title, (column, _) in _COLUMNS.items()}
        lines.append([contestant, *(_cell(title, value, contestant) for title, value in means.items())])
    titles = ["", *_COLUMNS]
    kept = [i for i in range(len(titles)) if i == 0 or any(line[i] for line in lines)]
    widths = [max(len(line[i]) for line in (titles, *lines)) for i in kept]

    def padded(cells: Sequence[str]) -> str:
        first, *rest = (cells[i] for i in kept)
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([padded(titles), rule, *map(padded, lines)])


def _cell(title: str, value: float, contestant: str) -> str:
    trained = title in ("updates", "seconds", "parameters")
    return "" if math.isnan(value) or (trained and contestant == REAL) else _COLUMNS[title][1].format(value)
