"""What every suite gives: a row for each candidate, the same in the table, in the CSV file and in a comparison."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdiff.benchmarks.harness import Timing


@dataclass(frozen=True)
class Row:
    """One candidate on one workload: its time and what it came to, or the remark why it has none.

    ``limit_s`` are the seconds below which this device does not do it, by the rates that were measured in the same run:
    a training step's share of it is its model FLOPs utilisation.
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
        return {**about, "rounds": rounds, **rounded, "remark": self.remark}


def require_columns(path: Path, columns: Sequence[str]) -> None:
    """ValueError where there is a CSV file with other columns, OSError where none can be written; a folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    with path.open("r+", newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != list(columns):
        raise ValueError(f"{path} has other columns: move it away or name another file with --csv")


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Add rows to a CSV file, with a header if it is new; ValueError where its columns are others."""
    require_columns(path, list(rows[0]))
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, as text; OSError where it cannot be read."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
