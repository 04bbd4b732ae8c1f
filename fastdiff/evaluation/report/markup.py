"""Text and numbers as HTML: everything that comes from a run is escaped here."""

import math
from html import escape
from typing import Any

from fastdiff.runtime.words import printable

LONGEST = 300
"""Characters of a text from a run that are shown; a longer one is cut."""

MISSING = "–"


def text(value: object, limit: int = LONGEST) -> str:
    """A text from a run for HTML, in elements and attributes: no markup, no control or bidirectional characters."""
    shown = printable(str(value))
    return escape(shown if len(shown) <= limit else f"{shown[: limit - 1]}…", quote=True)


def name(value: object) -> str:
    """Like ``text``, for an element: a name in another direction of writing does not reorder what follows."""
    return f"<bdi>{text(value)}</bdi>"


def figure(value: float | None, digits: int = 4) -> str:
    """A number in ``digits`` significant digits, whole ones with separators; a dash if it is not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "−")
    if not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_bare(mantissa)}e{int(exponent)}".replace("-", "−")
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return _bare(f"{value:,.{places}f}").replace("-", "−")


def rounded(value: float | None) -> str:
    """Like ``figure``, in three digits."""
    return figure(value, 3)


def _bare(number: str) -> str:
    """The number without zeros at its end."""
    return number.rstrip("0").rstrip(".") if "." in number else number


def percent(value: float | None) -> str:
    """A share as a percentage; a dash if it is not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.1f}%".replace("-", "−")


def size(count: int) -> str:
    """A number of bytes for people: 84 kB, 1.2 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{math.ceil(count / 1e3)} kB"


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 run, 2 runs."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def setting(value: Any) -> str:
    """A setting's value in words; the result is not escaped."""
    if value is None or value in ("", [], {}):
        return MISSING
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting, value[:50])) + (", …" if len(value) > 50 else "")
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"  # Python refuses to write the longest ones
    return str(value)
