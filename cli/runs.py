"""``fastdiff runs``: list the runs below a folder."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.cli.options import DebugFlag, path_argument

if TYPE_CHECKING:
    from fastdiff.evaluation.runs import ListedRun

COLUMNS = ("name", "kind", "step", "state", "loss", "age", "size")
MORE_COLUMNS = ("images/s", "best")
"""Columns of a terminal in which the whole names fit beside them."""

_RIGHT = {"step", "loss", "age", "size", "images/s"}
_GAP, _LEAST_NAME = 2, 12
_LAST_SECOND = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
_AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def runs(
    folder: Annotated[
        Path | None, path_argument(metavar="DIR", help="Folder with runs in it, or a run; by default runs/.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of a table.")] = False,
    debug: DebugFlag = False,
) -> None:
    """List the runs below a folder: step, state, last loss, age of the last update, size on disk; newest first.

    A wide terminal shows more columns, a narrow one fewer.
    """
    from fastdiff.evaluation.runs import find_runs

    root = folder or Path("runs")
    found = find_runs(root) if folder is not None or root.is_dir() else []
    if as_json:
        for run in found:
            typer.echo(json.dumps(_values(run)))
        return
    if not found:
        typer.echo(f"no run in {root}: train one with fastdiff train --data-dir DIR, or name another folder")
    for line in table(found, shutil.get_terminal_size().columns, time.time()):
        typer.echo(line)


def _values(run: "ListedRun") -> dict[str, Any]:
    updated = datetime.fromtimestamp(min(max(run.updated, 0), _LAST_SECOND), UTC).isoformat(timespec="seconds")
    values = {**asdict(run), "folder": str(run.folder), "updated": updated}
    if run.state == "damaged":
        return {name: values[name] for name in ("folder", "name", "state", "reason", "updated", "size")}
    return {name: value for name, value in values.items() if name != "reason"} | {"best": run.best or None}


def table(found: Sequence["ListedRun"], width: int, now: float) -> list[str]:
    """A table of the runs at the time ``now`` (s since 1970) with the first columns that fit a terminal's ``width``."""
    from rich.cells import cell_len

    if not found:
        return []
    every = (*COLUMNS, *MORE_COLUMNS)
    rows = [dict(zip(every, every, strict=True)), *(_cells(run, now) for run in found)]
    widths = {name: max(cell_len(row.get(name, "")) for row in rows) for name in every}
    shown = [name for name in every if any(row.get(name) for row in rows[1:])]

    def least() -> int:
        name = widths["name"] if shown[-1] in MORE_COLUMNS else min(widths["name"], _LEAST_NAME)
        return name + sum(_GAP + widths[column] for column in shown[1:])

    while len(shown) > 1 and least() > width:
        shown.pop()
    widths["name"] = min(widths["name"], max(1, width - sum(_GAP + widths[column] for column in shown[1:])))
    lines = []
    for row in rows:
        cells = [_padded(_shortened(row["name"], widths["name"]), widths["name"])]
        if "damage" in row:
            cells.append(_cut(row["damage"], width - widths["name"] - _GAP))
        else:
            cells += [_padded(row[column], widths[column], column in _RIGHT) for column in shown[1:]]
        lines.append(_cut((" " * _GAP).join(cells).rstrip(), width))
    return lines


def _padded(text: str, width: int, right: bool = False) -> str:
    from rich.cells import cell_len

    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _cut(text: str, width: int) -> str:
    """The text, or what fits of it before three dots."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 3) + "..." if width > 3 else "." * width


def _shortened(name: str, width: int) -> str:
    """The name, or its start and its end around three dots: names of runs often differ in their ends."""
    from rich.cells import cell_len

    if cell_len(name) <= width:
        return name
    end = name
    while cell_len(end) > max(0, width - 3) // 2:
        end = end[1:]
    return _cut(name, width - cell_len(end)) + end


def _cells(run: "ListedRun", now: float) -> dict[str, str]:
    if run.state == "damaged":
        return {"name": run.name, "damage": f"damaged: {run.reason}"}
    return {
        "name": run.name,
        "kind": run.kind,
        "step": f"{run.step}/{run.steps}",
        "state": run.state,
        "loss": "" if run.loss is None else f"{run.loss:.4g}",
        "age": _age(now - run.updated),
        "size": _size(run.size),
        "images/s": "" if run.images_per_s is None else f"{run.images_per_s:.1f}",
        "best": _best(run.best),
    }


def _best(best: dict[str, Any]) -> str:
    """What best.json says in short: fd 12.3 @2000."""
    from fastdiff.evaluation.runs import number
    from fastdiff.runtime.words import printable

    value, step = number(best.get("value")), best.get("step")
    if value is None or type(step) is not int:
        return ""
    return f"{printable(str(best.get('metric')))} {value:.4g} @{step}"


def _age(seconds: float) -> str:
    """Seconds in the largest unit that fits: 3 min."""
    unit, size = next((unit for unit in _AGES if seconds >= unit[1]), _AGES[-1])
    return f"{max(0, int(seconds // size))} {unit}"


def _size(count: int) -> str:
    """Bytes with two digits or more: 1.2 GB."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f} {units[0]}"
