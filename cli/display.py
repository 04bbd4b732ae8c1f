"""Progress of a long job: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from fastdiff.runtime.display import Lines


class _Note(ProgressColumn):
    """As many parts of a job's note as fit beside the bar, the first ones; before the first note, the job's speed."""

    def __init__(self, console: Console, bar_width: int) -> None:
        super().__init__()
        self._console = console
        self._bar_width = bar_width

    def render(self, task: Task) -> Text:
        """The note on one line."""
        note = task.fields["note"] or (f"{task.speed:.2g} per s" if task.speed else "")
        room = self._console.width - len(f"{task.description} {task.total:.0f}/{task.total:.0f}") - self._bar_width - 2
        parts = note.split("  ")
        while parts and len("  ".join(parts)) > room:
            parts.pop()
        return Text("  ".join(parts), no_wrap=True)


class Display(Lines):
    """A progress bar below the lines of a log. If stdout is not a terminal, only the lines are printed.

    A ``silent`` display prints nothing: of several processes only one reports.
    """

    def __init__(self, silent: bool = False) -> None:
        self.console = Console(soft_wrap=True, highlight=False, markup=False, quiet=silent)
        bar_width = max(8, min(40, self.console.width // 5))
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width),
            MofNCompleteColumn(),
            _Note(self.console, bar_width),
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
    """Reports the progress of the job ``what``: up to five times a second on a bar, every 30 seconds as lines."""

    def __init__(self, display: Display, what: str = "image steps") -> None:
        self._display, self._what = display, what
        self._shown = time.perf_counter()

    def __call__(self, done: int, total: int, note: str) -> None:
        now = time.perf_counter()
        if now - self._shown >= (0.2 if self._display.live else 30) or done == total:
            self._shown = now
            self._display.advance(self._what, done, total, note)
        if done == total:
            self._display.finish(self._what)
