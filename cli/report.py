"""``fastdiff report``: one page about one run, or about several over each other."""

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import DebugFlag, path_argument, path_option


def report(
    runs: Annotated[list[Path], path_argument(metavar="RUN", help="Run folders, such as runs/photos.")],
    out: Annotated[Path, path_option(help="HTML file to write.")] = Path("report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Write one page about a run, or about several over each other: curves, previews, samples, settings.

    For example: fastdiff report runs/photos runs/photos-lr3e-4 --out report.html

    The file contains everything and needs no network: open it in a browser, or send it.
    """
    from fastdiff.evaluation.report import write_report

    typer.echo(write_report(runs, out, overwrite).line())
