"""The table of compiled passes: how an operation is divided among programs, and what one of these needs on sm_90.

``python -m tests.programs.instructions`` writes the rows of the present kernels; those of earlier commits belong to the
times in ``results/h200.csv`` and ``h200_tune.csv``. Instructions are counted in the machine code of Triton 3.7.
"""

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("results")
TABLE = RESULTS / "compiled.csv"
PRESENT = "present"
"""In place of a commit: the kernels as they are."""
GROUPS = 32


class Compiled(NamedTuple):
    """A pass of an operation: the division of its work, and its programs compiled for sm_90."""

    commit: str
    workload: str
    candidate: str
    calls: int  # in a training step of the candidate's model
    launches: int
    programs: int  # of each launch that reads the images
    warps: int
    resident: int  # programs that fit on a multiprocessor
    registers: int
    groups: int  # of a program; 0 if the operation is no norm
    channels: int  # of a tile
    pixels: int
    stages: int  # chunks that are loaded ahead, and the present one
    trips: int  # iterations of each loop
    straight: int  # instructions of a warp outside loops
    loop: int  # of an iteration of the first loop
    second: int
    fingerprint: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, channels, height and width."""
        n, channels, size = re.findall(r"(?<= N)(\d+)(?: C(\d+))? (\d+)x", self.workload)[0]
        return int(n), int(channels or 3), int(size)

    @property
    def op(self) -> str:
        """Of the operation."""
        return self.workload.split()[0]

    @property
    def tensors(self) -> int:
        """Images of a norm that are read: x, or x and dy."""
        return 1 + (" backward, " in self.workload)

    @property
    def last(self) -> bool:
        """Whether channels are adjacent."""
        return self.workload.endswith("channels_last")

    @property
    def elements(self) -> int:
        """Values of an image tensor."""
        n, channels, size = self.shape
        return n * channels * size**2

    @property
    def floor(self) -> int:
        """The fewest bytes to move, as in cases.py."""
        if self.groups:
            return self.elements * 2 * (1 + self.tensors)
        if self.op == "diffusion_step":
            return self.elements * (20 if "given" in self.workload else 16)
        return self.elements * (28 if self.tensors == 2 else 20)

    @property
    def padding(self) -> float:
        """Lanes per value."""
        return self.programs * self.channels * self.pixels * max(self.trips, 1) / self.elements if self.groups else 1.0

    @property
    def run(self) -> int:
        """Adjacent bytes that a program reads."""
        _, channels, size = self.shape
        if not self.groups:
            return 4 * self.pixels
        width = min(self.groups * channels // GROUPS, channels)
        if self.last:
            return 2 * width * (self.pixels if width == channels else 1)
        return 2 * (self.pixels if self.pixels < size**2 else width * size**2)


def read() -> list[Compiled]:
    """The table of compiled passes."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [Compiled._make((*row[:3], *map(int, row[3:-1]), row[-1])) for row in rows]


def write(rows: Iterable[Compiled]) -> None:
    """Write the table."""
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(Compiled._fields)
        out.writerows(rows)
