"""What every suite gives: a row for each candidate, the same in the table, in the CSV file and in a comparison."""

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
from fastdiff.checkpoint import refuse_unwritable


@dataclass(frozen=True)
class Row:
    """One candidate on one workload: its time and what it came to, or the remark why it has none.

    ``limit_s`` are the seconds below which this device does not do it, by the rates that were measured in the same run:
    a training step's share of it is its model FLOPs utilisation, with what was measured in the place of a data sheet's.
    """

    suite: str
    workload: str
    candidate: str
    timing: Timing | None
    before: Timing | None = None  # of the rung below, in the same rounds
    images: int = 0  # that a call processes
    flops: float = math.nan
    n_bytes: float = math.nan
    limit_s: float = math.nan
    peak_gib: float = math.nan
    remark: str = ""
    failed: bool = False  # one of ours, and wrong or broken: the command's exit status says so
    against: str = ""  # the candidate that the speedup is over, where there is one

    def as_dict(self) -> dict[str, object]:
        """The columns of a CSV row."""
        timing = self.timing
        seconds = timing.median if timing else math.nan
        columns = {
            "median_s": seconds,
            "p20_s": timing.quantile(0.2) if timing else math.nan,
            "p80_s": timing.quantile(0.8) if timing else math.nan,
            "speedup": timing.speedup() if timing else math.nan,
            "speedup_p20": timing.speedup(0.2) if timing else math.nan,
            "speedup_p80": timing.speedup(0.8) if timing else math.nan,
            "gain": timing.speedup_over(self.before) if timing and self.before else math.nan,
            "images_per_s": self.images / seconds if self.images else math.nan,
            "gflop": self.flops / 1e9,
            "gbyte": self.n_bytes / 1e9,
            "share_of_limit": self.limit_s / seconds,
            "peak_gib": self.peak_gib,
        }
        about = {"suite": self.suite, "workload": self.workload, "candidate": self.candidate}
        rounds = len(timing.seconds) if timing else 0
        rounded = {name: float(f"{value:.4g}") for name, value in columns.items()}
        return {**about, "rounds": rounds, "against": self.against, **rounded, "remark": self.remark}


def with_against(rows: Sequence[Row]) -> list[Row]:
    """The rows of one table, each with the name of the candidate whose own rounds are its baseline."""
    timed = [(row.candidate, row.timing) for row in rows if row.timing]
    first = next((name for name, timing in timed if list(timing.seconds) == list(timing.baseline)), "")
    return [replace(row, against=first if row.timing and not math.isnan(row.timing.speedup()) else "") for row in rows]


def refuse_unwritable_file(option: str, path: Path) -> None:
    """ValueError, naming the option, where nothing can be written to ``path``; missing folders are made.

    What is there already stays as it is.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(f"{option} {path} is a link to nothing: name another file, or delete it")
    if os.path.isdir(path):
        raise ValueError(f"{option} {path} is a folder: name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{option} {path} is no regular file: name another one")
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
    """ValueError where no row with these columns can be added to a CSV file; its folder is made. Empty is as new."""
    refuse_unwritable_file("csv", path)
    if path.exists() and path.stat().st_size:
        header, _ = _read("csv", path)
        if header != list(columns):
            raise ValueError(f"csv {path} has other columns: move it away or name another file")


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, with a header if it is new: all of them, or OSError and none.

    ValueError where its columns are others.
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


def read_rows(path: Path, option: str = "csv") -> list[dict[str, str]]:
    """The rows of a CSV file, as text; ValueError, naming the option, where it is not there or not whole."""
    header, rows = _read(option, path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def _read(option: str, path: Path) -> tuple[list[str], list[list[str]]]:
    """The header and the rows."""
    if not os.path.isfile(path):
        what = "is no file" if os.path.exists(path) else "is not there"
        raise ValueError(f"{option} {path} {what}: name one that fastdiff benchmark --csv wrote")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a spreadsheet adds the mark
        header, *rows = list(csv.reader(io.StringIO(text, newline=""), strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{option} {path} is not a CSV file in UTF-8: name another file") from None
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read ({error.strerror}): name another file") from None
    wrong = next((number for number, row in enumerate(rows, start=1) if len(row) != len(header)), 0)
    if not wrong and rows and not text.endswith(("\n", "\r")):
        wrong = len(rows)
    if wrong:
        raise ValueError(f"{option} {path} is damaged in its row {wrong}: name another file, or delete that row")
    return header, rows
