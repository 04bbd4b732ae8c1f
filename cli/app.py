"""The command line: one Typer application, one file per command. Nothing here imports torch before a command runs."""

import difflib
import gc
import io
import os
import re
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from fastdiff import __version__
from fastdiff.cli import (
    benchmark,
    checkpoints,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    presets,
    report,
    runs,
    sample,
    scripts,
    train,
    train_classifier,
    tune_steps,
)
from fastdiff.cli.config_file import with_config_file
from fastdiff.cli.help import Paneled
from fastdiff.cli.options import SWITCHES, in_old_spelling, with_old_spelling
from fastdiff.runtime import threads

app = typer.Typer(
    name="fastdiff",
    help="Train pixel-space diffusion models from a folder of images, and sample from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # rich's tables cut off long flags on an 80-column terminal
)
app.command("train", cls=Paneled)(train.train)
app.command("train-classifier", cls=Paneled)(train_classifier.train_classifier)
app.command("sample", cls=Paneled)(sample.sample)
app.command("demo", cls=Paneled)(demo.demo)
app.add_typer(evaluate.app, name="evaluate")
app.command("ema", cls=Paneled)(checkpoints.ema)
app.command("report", cls=Paneled)(report.report)
app.command("runs", cls=Paneled)(runs.runs)
app.command("benchmark", cls=Paneled)(benchmark.benchmark)
app.command("tune-steps", cls=Paneled)(tune_steps.tune_steps)
app.command("presets", cls=Paneled)(presets.presets)
app.command("doctor", cls=Paneled)(doctor.doctor)
app.command("convert", cls=Paneled)(convert.convert)
app.add_typer(data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastdiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_INTERRUPTED = 130
"""The exit status after Ctrl-C."""

_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, or that of the click inside Typer: both have this base


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun's other processes have the same warnings
        typer.echo(f"warning: {message}", err=True)


def main() -> None:
    """Run the command line. Bad input prints one line on stderr, with exit status 2; ``--debug`` adds the traceback."""
    debug = "--debug" in sys.argv
    _escape_what_cannot_be_encoded()
    warnings.showwarning = _show_warning
    try:
        scripts.refuse_mpi(sys.argv[1:])
        words = with_old_spelling(sys.argv[1:] or ["--help"], SWITCHES | scripts.SWITCHES)
        if words[0] == "train" and in_old_spelling(sys.argv[2:]):
            words[1:1] = ["--recipe", "improved"]  # a --recipe among the words goes before it
        words = with_config_file(words)
        asked = {"-h", "--help", "--help-all"} & set(words)
        if scripts.script_of(words) and asked:
            typer.echo(f"{scripts.explained(words[0])}\n")
        words, said = scripts.in_our_words(words)
        if said and not asked and os.environ.get("RANK", "0") == "0" and "stdout" in scripts.log_formats():
            typer.echo(said)
        if words[0] in threads.COMMANDS:
            threads.wait_briefly(os.environ)
        status = app(words, standalone_mode=False)
        if status == _INTERRUPTED:
            gc.freeze()  # Python would search a half compiled model for cycles before it exits, for seconds
        sys.exit(status)
    except (ValueError, OSError, _UsageError) as error:
        if debug:
            traceback.print_exc()
        text = _with_neighbour(error) if isinstance(error, _UsageError) else str(error)
        if (speaker := _speaker(error)) is not None:
            typer.echo(f"{speaker}error: {' '.join(text.split())}", err=True)
        sys.exit(2)


_SYNONYMS = {
    "--learning-rate": "--lr",
    "--iterations": "--steps",
    "--num-steps": "--steps",
    "--resolution": "--image-size",
}
"""Other projects' names of flags that are spelled too differently to be found."""


def _with_neighbour(error: Any) -> str:
    """A usage error's text, with the flag or the value that was probably meant."""
    if (meant := _SYNONYMS.get(str(getattr(error, "option_name", "")).replace("_", "-"))) is not None:
        error.possibilities = [meant]
    text = str(error.format_message()).replace("Value error, ", "")  # the name of a class of pydantic's, inside Typer
    if (found := re.search(r"'([^']*)' is not one of (.*)\.$", text)) is not None:
        values = {value.replace("+", "p"): value for value in re.findall(r"'([^']*)'", found[2])}  # dpm++ is also dpmpp
        near = difflib.get_close_matches(found[1], values, 1)
        text = f"{text[:-1]}; did you mean {values[near[0]]}?" if near else text
    return text


def _escape_what_cannot_be_encoded() -> None:
    """Let a name that the terminal's encoding lacks (cp1252, ASCII) be escaped; it must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _speaker(error: Exception) -> str | None:
    """The prefix of an error line, which names the process under torchrun; None if another process reports it."""
    rank = os.environ.get("RANK", "0")
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return "" if os.environ.get("LOCAL_RANK", "0") == "0" else None  # same flags, same error
    from fastdiff.runtime.distributed import SaidElsewhere

    if isinstance(error, SaidElsewhere):
        return None
    return "" if rank == "0" else f"process {rank}: "
