"""Text for people: durations, names that others chose, and the errors of other libraries."""

from itertools import pairwise


def duration(seconds: float) -> str:
    """Format seconds in the two largest units that fit: 3 d 4 h, 2 h 5 min, 1 min 30 s."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    whole = round(seconds)
    for (name, size), (small_name, small) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // small} {small_name}"
    return f"{whole} s"


def printable(text: str) -> str:
    """Replace unprintable characters: file names may hold line breaks, terminal codes or bytes of another encoding."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def first_line(error: BaseException, limit: int = 100) -> str:
    """The first line of an error's message, at most ``limit`` characters, to quote in another message."""
    said = printable(str(error).strip().partition("\n")[0])[:limit]
    return said or ("truncated" if isinstance(error, EOFError) else type(error).__name__)
