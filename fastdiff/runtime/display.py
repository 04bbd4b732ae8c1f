"""Where a long job shows its lines and its progress."""

from collections.abc import Callable


class Lines:
    """Passes the lines of a log to ``show``, and of the progress the notes alone."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def line(self, text: str) -> None:
        """A line of the log."""
        self._show(text)

    def advance(self, what: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` of the job called ``what``; the note, if there is one, becomes a line."""
        if note:
            self.line(f"{what} {done}/{total}  {note}")

    def finish(self, what: str) -> None:
        """The job called ``what`` is done."""
