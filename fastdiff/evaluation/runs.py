"""The runs below a folder, each as its JSON files describe it: no checkpoint is read, and PyTorch is not imported."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.runtime.files import open_regular
from fastdiff.runtime.lease import held
from fastdiff.runtime.words import first_line, printable

DEPTH = 3
"""Levels of folders that are searched for runs; runs/NAME is in the first one below runs/."""

_MANIFEST = re.compile(r"manifest(\d{6,})\.json")
_PROGRESS = "progress.jsonl"
_WRITTEN = {"config.json", _PROGRESS, "log.txt"}
_TAIL = 2**16
"""Bytes at the end of progress.jsonl, in which its last row is."""
_LARGEST = 2**24
"""Bytes of a JSON file that is read."""
_MOST_STEPS = 2**53
_BEST = ("checkpoint", "step", "ema_rate", "metric", "name", "value")


@dataclass(frozen=True)
class ListedRun:
    """A run. ``state`` is running, finished, stopped or damaged, and a damaged one has a ``reason``.

    ``kind`` is model or classifier; the run is at ``step`` of ``steps``. ``loss`` and ``images_per_s`` are those of the
    last row of its log, ``updated`` the time (s since 1970) when it last wrote, ``size`` the bytes of all its files.
    ``best`` is what best.json says, {} without one.
    """

    folder: Path
    name: str
    updated: float
    size: int
    state: str
    reason: str = ""
    kind: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    images_per_s: float | None = None
    best: dict[str, Any] = field(default_factory=dict)


def find_runs(root: Path) -> list[ListedRun]:
    """The runs in the folder ``root`` and up to DEPTH levels below it, the last to write first.

    A run that cannot be read is damaged. ValueError or OSError if ``root`` is not a folder that can be read.
    """
    if not root.is_dir():
        raise ValueError(f"{root} {'is a file' if root.exists() else 'does not exist'}: name a folder with runs in it")
    try:
        os.listdir(root)
    except OSError as error:
        raise OSError(f"{root} cannot be read ({error.strerror}): name another folder") from None
    return sorted(_below(root, root, DEPTH), key=lambda run: (-run.updated, run.name))


def _below(root: Path, folder: Path, depth: int) -> Iterator[ListedRun]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    if (run := _run(root, folder, names)) is not None:
        yield run
    elif depth:
        for name in names:
            if not name.startswith(".") and os.path.isdir(folder / name):
                yield from _below(root, folder / name, depth - 1)


def _run(root: Path, folder: Path, names: list[str]) -> ListedRun | None:
    """The run in ``folder``, whose entries have these names; None if it holds none."""
    saved = {name: int(match[1]) for name in names if (match := _MANIFEST.fullmatch(name))}
    if "config.json" not in names and not saved:
        return None
    name = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
    times = [_time(folder / name) for name in names if name in _WRITTEN or name in saved]
    about: dict[str, Any] = {"folder": folder, "name": printable(name), "updated": max(times), "size": _size(folder)}
    try:
        config = _object(folder / "config.json")
        parts = [config.get(part) for part in ("model", "train")]
        if parts == [None, None] and not saved and _PROGRESS not in names:
            return None  # another program's
        model, train = (part if isinstance(part, dict) else {} for part in parts)
        steps = train.get("steps")
        if not model or type(steps) is not int or not 0 < steps < _MOST_STEPS:
            raise ValueError("config.json is not a run's")
        row = _last_row(folder / _PROGRESS)
    except (ValueError, OSError) as error:
        return ListedRun(**about, state="damaged", reason=first_line(error))
    newest = max(saved.values(), default=0)
    state = "finished" if newest >= steps else "stopped"
    return ListedRun(
        **about,
        state="running" if held(folder) else state,
        kind="classifier" if "classifier_width" in model else "model",
        step=max(newest, row.get("step", 0)),
        steps=steps,
        loss=number(row.get("loss")),
        images_per_s=number(row.get("images_per_s")),
        best=_best(folder / "best.json"),
    )


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError or OSError, which names the file, if there is none."""
    try:
        with open_regular(path) as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError("too long")
        found = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise OSError(f"{path.name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is damaged (not an object)")
    return found


def _best(path: Path) -> dict[str, Any]:
    """The text and the numbers of best.json; {} if it does not name a step and a value."""
    try:
        found = _object(path)
    except (ValueError, OSError):
        return {}
    best = {key: found[key] for key in _BEST if isinstance(found.get(key), str) or number(found.get(key)) is not None}
    return best if type(best.get("step")) is int and number(best.get("value")) is not None else {}


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole row of progress.jsonl, {} without one; OSError, which names the file, if it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read(_TAIL).splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OSError(f"{path.name} cannot be read ({error.strerror})") from None
    for line in reversed(lines):
        with suppress(ValueError, RecursionError):  # half a line, as a killed process leaves it
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < _MOST_STEPS:
                return row
    return {}


def number(value: object) -> float | None:
    """A finite number of a JSON file; None for anything else."""
    with suppress(OverflowError):  # an integer beyond the floating-point numbers
        if type(value) in (int, float) and math.isfinite(found := float(value)):  # type: ignore[arg-type]
            return found
    return None


def _size(folder: Path) -> int:
    """The bytes of all files below a folder, without those that are deleted meanwhile."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
