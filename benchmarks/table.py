"""Rows as a table for people, of at most 100 columns."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdiff.benchmarks.rows import Row

UNITS = ((1.0, "s"), (1e-3, "ms"), (0.0, "us"))
"""From so many seconds on."""


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The rows of one suite and workload; columns without a figure are left out, and remarks stand below."""
    fastest = min((row.timing.median for row in rows if row.timing), default=math.nan)
    least, unit = next((found for found in UNITS if fastest >= found[0]), UNITS[0])
    scale = least or 1e-6
    values = [row.as_dict() for row in rows]
    columns: dict[str, list[str]] = {
        f"median, {unit}": [_figure(row.timing.median / scale if row.timing else math.nan) for row in rows],
        "p20 to p80": [_spread(row, scale) for row in rows],
        "images/s": [_figure(v["images_per_s"]) for v in values],
        "× first": [_times(v["speedup"]) for v in values],
        "× before": [_times(v["gain"]) for v in values],
        "of limit": [_share(v["share_of_limit"]) for v in values],
        "GiB": [_figure(v["peak_gib"]) for v in values],
    }
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("candidate", overflow="fold")
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for row, *cells in zip(rows, *shown.values(), strict=True):
        table.add_row(Text(row.candidate), *cells)
    console.print(Text(f"\n{rows[0].suite}: {rows[0].workload}", style="bold"))
    console.print(table)
    for row in rows:
        if row.remark:
            console.print(Text(f"  {row.candidate}: {row.remark}"))


def _spread(row: Row, scale: float) -> str:
    if row.timing is None or len(row.timing.seconds) == 1:
        return ""
    return f"{_figure(row.timing.quantile(0.2) / scale)} to {_figure(row.timing.quantile(0.8) / scale)}"


def _figure(value: object) -> str:
    """Three digits at least."""
    number = float(str(value))
    if math.isnan(number):
        return ""
    return f"{number:,.0f}" if number >= 1000 else f"{number:#.3g}".rstrip(".")


def _times(value: object) -> str:
    number = float(str(value))
    return "" if math.isnan(number) else f"{number:.2f}"


def _share(value: object) -> str:
    number = float(str(value))
    return "" if math.isnan(number) else f"{number:.0%}"
