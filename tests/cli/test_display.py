"""The bar of a long job, on terminals of every width."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from fastdiff.cli import display as module
from fastdiff.cli.display import Display

NOTE = "loss 0.1234  3 h 12 min left  12.3 images/s  grad norm 0.312  data wait 0%"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The last line of a terminal of so many columns after one update with this note."""

    def show(columns: int, note: str, updates: int = 1) -> str:
        out = io.StringIO()
        monkeypatch.setattr(
            module, "Console", lambda **how: Console(file=out, force_terminal=True, width=columns, **how)
        )
        with Display() as display:
            for done in range(updates):
                display.advance("step", done, 200_000)
            display.advance("step", 123_456, 200_000, note)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).splitlines()[-1]

    return show


@pytest.mark.parametrize(
    ("columns", "seen"), [(40, "loss 0.1234"), (80, "loss 0.1234  3 h 12 min left  12.3 images/s"), (200, NOTE)]
)
def test_what_matters_most_is_what_fits(shown: Any, columns: int, seen: str) -> None:
    line = shown(columns, NOTE)
    assert len(line) <= columns
    assert re.fullmatch(rf"step [━╸╺]+ 123456/200000 {re.escape(seen)}", line.rstrip()), line


def test_the_speed_is_shown_before_the_first_note(shown: Any) -> None:
    assert re.search(r"123456/200000 [\d.e+]+ per s$", shown(80, "", updates=3).rstrip())
