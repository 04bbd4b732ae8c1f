"""The result of every suite: one row per candidate, the same in the table, in the CSV file and in a comparison."""

import contextlib
import csv
import io
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastdiff.benchmarks.harness import Timing
from fastdiff.runtime.files import refuse_unwritable

Values = Mapping[str, object]
"""A CSV row by its columns. Its figures are numbers or, if it was read from a file, text."""


@dataclass(frozen=True)
class Row:
    """One candidate on one workload: its time and figures, or a remark that says why it has none.

    ``limit_s`` is the least time in seconds on this device, by the rates measured in the same run. A training step's
    share of it is its model FLOPs utilisation, with measured rates in place of a data sheet's.
    """

    suite: str
    workload: str
    candidate: str
    timing: Timing | None
    before: Timing | None = None  # of the rung below, in the same rounds
    images: int = 0  # per call
    flops: float = math.nan
    n_bytes: float = math.nan
    limit_s: float = math.nan
    peak_gib: float = math.nan
    remark: str = ""
    failed: bool = False  # one of our candidates was wrong or failed; decides the command's exit status
    against: str = ""  # the baseline of the speedup, if there is one
    kernels: str = ""  # of a steady step on a GPU, by time; not in the CSV file

    def as_dict(self) -> dict[str, object]:
        """The columns of a CSV row."""
        timing = self.timing or Timing("", [math.nan], [math.nan])
        figures = {
            "median_s": timing.median,
            "p20_s": timing.quantile(0.2),
            "p80_s": timing.quantile(0.8),
            "speedup": timing.speedup(),
            "speedup_p20": timing.speedup(0.2),
            "speedup_p80": timing.speedup(0.8),
            "gain": timing.speedup_over(self.before) if self.timing and self.before else math.nan,
            "images_per_s": self.images / timing.median if self.images else math.nan,
            "gflop": self.flops / 1e9,
            "gbyte": self.n_bytes / 1e9,
            "share_of_limit": self.limit_s / timing.median,
            "peak_gib": self.peak_gib,
        }
        about = {"suite": self.suite, "workload": self.workload, "candidate": self.candidate}
        rounds = len(timing.seconds) if self.timing else 0
        rounded = {name: float(f"{figure:.4g}") for name, figure in figures.items()}
        return {**about, "rounds": rounds, "against": self.against, **rounded, "remark": self.remark}


def with_against(rows: Sequence[Row]) -> list[Row]:
    """The rows of one table, each with the name of the candidate that is its baseline."""
    timed = [(row.candidate, row.timing) for row in rows if row.timing]
    first = next((name for name, timing in timed if list(timing.seconds) == list(timing.baseline)), "")
    return [replace(row, against=first if row.timing and not math.isnan(row.timing.speedup()) else "") for row in rows]


def number(row: Values, column: str) -> float:
    """A figure of a CSV row; NaN if it was not measured."""
    return float(str(row[column]))


def refuse_unwritable_file(option: str, path: Path) -> None:
    """Raise a ValueError that names the option if ``path`` cannot be written. Creates missing folders.

    An existing file stays unchanged.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(f"{option} {path} is a broken link: name another file, or delete it")
    if os.path.isdir(path):
        raise ValueError(f"{option} {path} is a folder: name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{option} {path} is not a regular file: name another one")
    try:
        refuse_unwritable(option, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.exists(path):
            path.open("r+b").close()
        else:
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp").cleanup()
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written ({error.strerror}): name another file") from None


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """Raise a ValueError if rows with these columns cannot be added to a CSV file. An empty file counts as new.

    Creates the file's folder.
    """
    refuse_unwritable_file("csv", path)
    if path.exists() and path.stat().st_size:
        read_rows(path, columns=columns)


def append_rows(path: Path, rows: Sequence[Values]) -> None:
    """Add all rows to a CSV file, with a header if it is new; on an OSError none is added.

    ValueError if its columns are different.
    """
    require_columns(path, list(rows[0]))
    size = path.stat().st_size if path.exists() else 0
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    if not size:
        writer.writeheader()
    writer.writerows(rows)
    try:
        with path.open("ab") as file:
            file.write(text.getvalue().encode())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size) if size else path.unlink()
        raise OSError(f"csv {path} cannot be written: {error.strerror}") from error


def read_rows(path: Path, option: str = "csv", columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a CSV file, as text.

    ValueError, naming the option, if it does not exist, is damaged, or has other columns than ``columns``.
    """
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise ValueError(f"{option} {path} {what}: name one that fastdiff benchmark --csv wrote")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a spreadsheet adds a byte order mark
        header, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{option} {path} is not a CSV file in UTF-8: name another file") from None
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read ({error.strerror}): name another file") from None
    damaged = [place for place, row in enumerate(rows, start=1) if len(row) != len(header)]
    if rows and not text.endswith(("\n", "\r")):
        damaged.append(len(rows))
    if damaged:
        raise ValueError(f"{option} {path} is damaged in its row {damaged[0]}: name another file, or delete that row")
    if columns is not None and header != list(columns):
        raise ValueError(f"{option} {path} has different columns: move it away or name another file")
    return [dict(zip(header, row, strict=True)) for row in rows]
