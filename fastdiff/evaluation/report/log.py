"""What log.txt says that no other file of a run does."""

import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from fastdiff.runtime.files import open_regular

WARNINGS = 12
"""Warnings that are kept, the last ones."""

_LONGEST_LINE = 2**16
_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (?P<text>.*)")
_ABOUT = re.compile(r"(data|model|on|held out|warning): |stopped by ")
_IMAGES = re.compile(r"data: ([\d,]{1,20}) images? ")


@dataclass(frozen=True)
class Log:
    """The lines of the log about the data, the model and the machine, the last ones, and its times; "" if it has none.

    ``warnings`` are the last WARNINGS of ``warned``, with their times.
    """

    first: str = ""
    last: str = ""
    about: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    warned: int = 0
    stopped: str = ""

    def line(self, kind: str) -> str:
        """The text of the last line of a kind, such as "data" or "on"; empty if there is none."""
        return dict(self.about).get(kind, "")

    @property
    def images(self) -> int | None:
        """The number of images in the data."""
        found = _IMAGES.match(f"data: {self.line('data')}")
        return int(found[1].replace(",", "")) if found and found[1].strip(",") else None


def read_log(path: Path) -> Log:
    """Read log.txt, a line at a time; an empty log if it cannot be read."""
    first = last = stopped = ""
    about: dict[str, str] = {}
    warnings: deque[str] = deque(maxlen=WARNINGS)
    warned = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(_LONGEST_LINE):
                match = _LINE.match(line.decode(errors="replace").rstrip("\r\n"))
                if match is None:
                    continue
                first, last = first or match["time"], match["time"]
                said = match["text"]
                if (kind := _ABOUT.match(said)) is None:
                    continue
                if kind[1] == "warning":
                    warned += 1
                    warnings.append(f"{match['time']}  {said.removeprefix('warning: ')}")
                elif kind[1] is None:
                    stopped = said
                else:
                    about[kind[1]] = said.partition(": ")[2]
    except OSError:
        pass
    return Log(first, last, tuple(about.items()), tuple(warnings), warned, stopped)
