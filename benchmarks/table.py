"""Rows as a table: for the terminal, of at most 100 columns or as many as it has, and for a document.

``python -m fastdiff.benchmarks.table rows.csv`` prints a CSV file as Markdown, for docs/performance.md.
"""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fastdiff.benchmarks.rows import Row, read_rows

Values = Mapping[str, object]
"""The columns of a CSV row."""

EXPENDABLE = ("GiB", "p20 to p80", "of limit", "images/s", "× before")
"""Columns that are left out on a narrow terminal, in this order."""

NAME_WIDTH = 20
"""Characters of a candidate's name that stay on one line before a column is left out."""

UNITS = ((1.0, "s"), (1e-3, "ms"), (0.0, "us"))
"""Each with the seconds from which it is used."""


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print the rows of one suite and workload. Columns without a figure are left out, and remarks follow the table."""
    names = [row.candidate for row in rows]
    columns = _columns([row.as_dict() for row in rows])
    unbounded = console.options.update(max_width=1000)
    for title in EXPENDABLE:
        if Measurement.get(console, unbounded, _table(names, columns)).minimum <= console.width:
            break
        columns.pop(title, None)
    console.print(Text(f"\n{rows[0].suite}: {rows[0].workload}", style="bold"))
    console.print(_table(names, columns))
    for row in rows:
        if row.remark:
            console.print(Text(f"  {row.candidate}: {row.remark}"))


def _table(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("candidate", overflow="fold", min_width=min(NAME_WIDTH, max(map(len, names))))
    for title, column in columns.items():
        table.add_column(title, justify="right", no_wrap=True, min_width=max(map(len, (title, *column))))
    for name, *cells in zip(names, *columns.values(), strict=True):
        table.add_row(Text(name), *cells)
    return table


def markdown(rows: Sequence[Values]) -> str:
    """The rows as sections of a document, one for each suite and workload."""
    sections = []
    for (suite, workload), group in itertools.groupby(rows, lambda row: (row["suite"], row["workload"])):
        values = list(group)
        columns = _columns(values)
        lines = [
            f"**{suite}: {workload}**",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---" + "|---:" * len(columns) + "|",
        ]
        for value, *cells in zip(values, *columns.values(), strict=True):
            lines.append("| " + " | ".join([str(value["candidate"]), *cells]) + " |")
        remarks = [f"- {value['candidate']}: {value['remark']}" for value in values if value["remark"]]
        sections.append("\n".join([*lines, *[""] * bool(remarks), *remarks]))
    return "\n\n".join(sections)


def _columns(values: Sequence[Values]) -> dict[str, list[str]]:
    """The cells of each column that has any, by title."""
    fastest = min((s for v in values if not math.isnan(s := _number(v["median_s"]))), default=math.nan)
    least, unit = next((found for found in UNITS if fastest >= found[0]), UNITS[0])
    scale = least or 1e-6
    columns = {
        f"median, {unit}": [_figure(_number(v["median_s"]) / scale) for v in values],
        "p20 to p80": [_spread(v, scale) for v in values],
        "images/s": [_figure(_number(v["images_per_s"])) for v in values],
        "× first": [_times(v["speedup"]) for v in values],
        "× before": [_times(v["gain"]) for v in values],
        "of limit": [_share(v["share_of_limit"]) for v in values],
        "GiB": [_figure(_number(v["peak_gib"])) for v in values],
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


def _number(value: object) -> float:
    return float(str(value))


def _spread(values: Values, scale: float) -> str:
    if int(str(values["rounds"])) < 2:
        return ""
    return " to ".join(_figure(_number(values[name]) / scale) for name in ("p20_s", "p80_s"))


def _figure(number: float) -> str:
    """At least three significant digits."""
    if math.isnan(number):
        return ""
    return f"{number:,.0f}" if number >= 1000 else f"{number:#.3g}".rstrip(".")


def _times(value: object) -> str:
    return "" if math.isnan(number := _number(value)) else f"{number:.2f}"


def _share(value: object) -> str:
    return "" if math.isnan(number := _number(value)) else f"{number:.0%}"


if __name__ == "__main__":
    print(markdown(read_rows(Path(sys.argv[1]))))
