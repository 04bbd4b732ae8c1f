"""The table of compiled programs, results/programs.csv: what every launch in use needs on every target.

A program is identified by its fingerprint, a hash of its source and of all compile-time choices. Its figures belong to
one release of Triton. An unchanged program need not be compiled again to know that it does not spill.
"""

import csv
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

TABLE = Path(__file__).resolve().parent / "results" / "programs.csv"

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Key:
    """What determines the figures of a compiled program."""

    fingerprint: str
    target: str
    triton: str


@dataclass(frozen=True)
class Figures:
    """What a compiled program needs, and the first workload that runs it.

    Registers are per thread, spills and shared memory in bytes (spills: registers on ROCm); loads and stores are
    instructions on global memory, the wide ones those of 16 bytes.
    """

    kernel: str
    workload: str
    registers: int
    spills: int
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    matrix_units: str


def read(path: Path = TABLE) -> dict[Key, Figures]:
    """The table; empty if there is no file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {_made(Key, row): _made(Figures, row) for row in csv.DictReader(file)}


def write(table: Mapping[Key, Figures], path: Path = TABLE) -> None:
    """Write the table, sorted by kernel, workload and target."""
    rows = [asdict(key) | asdict(figures) for key, figures in table.items()]
    rows.sort(key=lambda row: (row["kernel"], row["workload"], row["target"], row["fingerprint"]))
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, [f.name for kind in (Key, Figures) for f in fields(kind)], lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def share_of_today(items: Sequence[T], size: int, day: int | None = None) -> list[T]:
    """About ``size`` of the items, different ones every day, until all of them have been chosen."""
    parts = max(len(items) // size, 1)
    return list(items[(datetime.date.today().toordinal() if day is None else day) % parts :: parts])


def _made(kind: type[T], row: Mapping[str, str]) -> T:
    return kind(**{f.name: int(row[f.name]) if f.type is int else row[f.name] for f in fields(kind)})  # type: ignore[arg-type]


def differences(found: Figures, kept: Figures) -> Iterable[str]:
    """The figures that differ from the table's, as text."""
    for field in fields(Figures):
        one, other = getattr(kept, field.name), getattr(found, field.name)
        if field.name != "workload" and one != other:
            yield f"{field.name} {other}, not {one}"
