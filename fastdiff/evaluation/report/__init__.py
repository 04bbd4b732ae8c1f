"""The report of one or several runs: a single HTML file that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastdiff.evaluation.report.gallery import read_gallery
from fastdiff.evaluation.report.markup import counted, size
from fastdiff.evaluation.report.page import page
from fastdiff.evaluation.report.run import named, open_run, told_apart
from fastdiff.runtime.files import refuse_unwritable, replacing


@dataclass(frozen=True)
class Report:
    """A written report: its file, its length in bytes, and the numbers of runs and of embedded previews."""

    path: Path
    bytes: int
    runs: int
    previews: int

    def line(self) -> str:
        """The report in one line."""
        return (
            f"wrote {self.path} ({size(self.bytes)}, {counted(self.runs, 'run')}, {counted(self.previews, 'preview')})"
        )


def write_report(folders: Sequence[Path], out: Path, overwrite: bool = False) -> Report:
    """Write the report of the runs in ``folders`` to the HTML file ``out``, whole or not at all.

    What of a run is missing or damaged is said in its place. ValueError if a folder holds no run or is named twice, or
    if ``out`` is unsuitable, or exists and may not be overwritten; OSError if it cannot be written.
    """
    _check(out, overwrite)
    found = told_apart([open_run(folder) for folder in folders])
    runs = [replace(run, name=name) for run, name in zip(found, named(found), strict=True)]
    pictures = read_gallery(runs)
    try:
        with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            for part in page(runs, pictures):
                file.write(part)
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error.strerror or error}): name another file with --out") from error
    return Report(out, out.stat().st_size, len(runs), pictures.count)


def _check(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out {out} must end in .html")
    if out.is_dir():
        raise ValueError(f"out {out} is a folder: name a file")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: name another file with --out, or use --overwrite")
    refuse_unwritable("out", out.parent)
