"""Human-readable numbers."""

from itertools import pairwise


def duration(seconds: float) -> str:
    """Format seconds in the two largest units that fit: 3 d 4 h, 2 h 5 min, 1 min 30 s."""
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    whole = round(seconds)
    for (name, size), (small_name, small) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // small} {small_name}"
    return f"{whole} s"
