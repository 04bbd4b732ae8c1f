"""Progress of a long job: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fastdiff.runtime.display import Lines


class Display(Lines):
    """A progress bar below the lines of a log. If stdout is not a terminal, only the lines are printed.

    A ``silent`` display prints nothing: of several processes only one reports.
    """

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(soft_wrap=True, highlight=False, markup=False, quiet=silent)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.live,
        )
        self._tasks: dict[str, TaskID] = {}

    @property
    def live(self) -> bool:
        """Whether there is a bar."""
        return self.console.is_terminal and not self.console.quiet

    def line(self, text: str) -> None:
        """Print a line of the log."""
        try:
            self.console.print(text)
        except (OSError, SystemExit):  # the reader is gone (rich exits on a broken pipe): the job continues silently
            self.console.quiet = True

    def advance(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total`` of the job ``what``. A note stays on the bar until the next one, or is a line."""
        if not self.live:
            super().advance(what, done, total, note)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total, note="")
        self._bar.update(self._tasks[what], completed=done)
        if note:
            self._bar.update(self._tasks[what], note=note)

    def finish(self, what: str) -> None:
        """Remove the bar of a job."""
        if what in self._tasks:
            self._bar.remove_task(self._tasks.pop(what))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


class Slowly:
    """Reports the progress of a job: up to five times a second on a bar, every 30 seconds as lines."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._shown = time.perf_counter()

    def __call__(self, done: int, total: int, note: str) -> None:
        now = time.perf_counter()
        if now - self._shown >= (0.2 if self._display.live else 30) or done == total:
            self._shown = now
            self._display.advance("image steps", done, total, note)
