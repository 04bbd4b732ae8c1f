"""Log lines and progress of a long job."""

from collections.abc import Callable


class Lines:
    """Passes log lines to ``show``; of the progress, only the notes."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def line(self, text: str) -> None:
        """Show a line of the log."""
        self._show(text)

    def advance(self, what: str, done: int, total: int, note: str = "") -> None:
        """Report ``done`` of ``total`` for the job ``what``; a non-empty note becomes a line."""
        if note:
            self.line(f"{what} {done}/{total}  {note}")

    def finish(self, what: str) -> None:
        """Report that the job ``what`` is done."""
