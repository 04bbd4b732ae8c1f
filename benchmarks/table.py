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

from fastdiff.benchmarks.rows import Row, Values, number, read_rows

EXPENDABLE = ("GiB", "p20 to p80", "of limit", "images/s", "× before")
"""Columns that are left out on a narrow terminal, in this order."""

NAME_WIDTH = 20
"""Characters of a candidate's name that stay on one line before a column is left out."""


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
        titles = "| | " + " | ".join(columns) + " |"
        lines = [f"**{suite}: {workload}**", "", titles, "|---" + "|---:" * len(columns) + "|"]
        for row, *cells in zip(values, *columns.values(), strict=True):
            lines.append("| " + " | ".join([str(row["candidate"]), *cells]) + " |")
        remarks = [f"- {row['candidate']}: {row['remark']}" for row in values if row["remark"]]
        sections.append("\n".join([*lines, *[""] * bool(remarks), *remarks]))
    return "\n\n".join(sections)


def _columns(rows: Sequence[Values]) -> dict[str, list[str]]:
    """The cells of each column that has any, by title."""
    fastest = min((s for row in rows if not math.isnan(s := number(row, "median_s"))), default=math.nan)
    unit, scale = ("us", 1e-6) if fastest < 1e-3 else ("ms", 1e-3) if fastest < 1 else ("s", 1)

    def cell(row: Values, column: str, form: str = "", divisor: float = 1) -> str:
        value = number(row, column) / divisor
        if math.isnan(value):
            return ""
        # by default at least three significant digits
        return format(value, form or ",.0f") if form or value >= 1000 else f"{value:#.3g}".rstrip(".")

    def spread(row: Values) -> str:
        return " to ".join(cell(row, column, divisor=scale) for column in ("p20_s", "p80_s"))

    columns = {
        f"median, {unit}": [cell(row, "median_s", divisor=scale) for row in rows],
        "p20 to p80": [spread(row) if number(row, "rounds") > 1 else "" for row in rows],
        "images/s": [cell(row, "images_per_s") for row in rows],
        "× first": [cell(row, "speedup", ".2f") for row in rows],
        "× before": [cell(row, "gain", ".2f") for row in rows],
        "of limit": [cell(row, "share_of_limit", ".0%") for row in rows],
        "GiB": [cell(row, "peak_gib") for row in rows],
    }
    return {title: cells for title, cells in columns.items() if any(cells)}


if __name__ == "__main__":
    print(markdown(read_rows(Path(sys.argv[1]))))
