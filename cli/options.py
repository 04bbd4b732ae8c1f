"""Options derived from the configurations: a flag is declared and described once, in fastdiff/config/."""

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from enum import StrEnum
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args

import typer

from fastdiff.cli.help import OF_STATE_DICTS, HelpAllFlag
from fastdiff.config import (
    ClassifierConfig,
    ClassifierTrainConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    RuntimeConfig,
    SampleConfig,
    StartConfig,
    TrainConfig,
)

Command = Callable[..., None]
Flags = dict[str, Any]
"""The given flags by field name; a flag that was not given is absent."""

_TRUE, _FALSE = {"true", "1", "yes", "t", "y"}, {"false", "0", "no", "f", "n"}


def as_path(text: str | Path) -> Path:
    """Parse a path of the command line and expand "~". An empty path is an error that names the option."""
    if not str(text).strip():
        raise typer.BadParameter("a path must not be empty: name a file or folder")
    return Path(os.path.expanduser(text))  # Path.expanduser fails for ~nobody


def as_text_of_path(text: str) -> str:
    """Like as_path, for a field of a configuration."""
    return str(as_path(text))


path_option = partial(typer.Option, parser=as_path, metavar="PATH")
path_argument = partial(typer.Argument, parser=as_path)

PresetFlag = Annotated[
    str | None,
    typer.Option(help="A released model's flags, see fastdiff presets.", rich_help_panel=ModelConfig.panel),
]
CheckpointArgument = Annotated[
    Path | None,
    path_argument(help="Checkpoint file, run folder or RUN@STEP; by default the newest run under runs/."),
]
EmaRateFlag = Annotated[
    str | None, typer.Option(help="EMA to take from a run folder, by rate, or raw; by default the highest.")
]
EmaLengthFlag = Annotated[
    float | None,
    typer.Option(help="Average of this length (sigma_rel) of a run with --ema-lengths, instead of --ema-rate."),
]
ConfigFlag = Annotated[
    Path | None,
    path_option(
        help="Read flags from this .toml, .yaml or .json file, such as a run's config.json; given flags override it."
    ),
]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def with_flags(
    *configs: type[Config], of_state_dicts: Sequence[type[Config]] = (), without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add every field of ``configs`` to a command as an option; its argument ``flags`` receives the given ones.

    The fields of ``of_state_dicts`` are options, too, which only --help-all shows. Fields named in ``without`` are left
    out. If two configurations share a field name, it becomes one option, that of the first.
    """
    derived: dict[str, inspect.Parameter] = {}
    for config in (*configs, *of_state_dicts):
        end = OF_STATE_DICTS if config in of_state_dicts else ""
        for f in fields(config):  # type: ignore[arg-type]  # every Config is a dataclass
            if f.name not in without:
                derived.setdefault(f.name, _parameter(f, f.metadata["panel"] or config.panel + end))

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> None:
            for name in ("config", "help_all"):  # read before the command
                values.pop(name, None)
            flags = {name: values.pop(name, None) for name in derived}
            command(flags={name: value for name, value in flags.items() if value is not None}, **values)

        own = [p for p in inspect.signature(command).parameters.values() if p.name != "flags"]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own] + list(derived.values())
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("config", kind, default=None, annotation=ConfigFlag))
        if of_state_dicts:
            parameters.append(inspect.Parameter("help_all", kind, default=False, annotation=HelpAllFlag))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(field: Field[Any], panel: str) -> inspect.Parameter:
    kind: Any = field.type
    if isinstance(kind, UnionType):
        kinds = [k for k in get_args(kind) if k is not type(None)]
        kind = str if str in kinds else kinds[0]
    flag = field.name.replace("_", "-")
    spelling = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    if kind not in (bool, int, float) and not (isinstance(kind, type) and issubclass(kind, StrEnum)):
        kind = str  # tuples too, written as "16,8"
    parse: dict[str, Any] = {"parser": as_text_of_path, "metavar": "PATH"} if field.metadata["path"] else {}
    shown = field.metadata["help"] + _shown(field.metadata["shown"])
    option = typer.Option(spelling, help=shown, show_default=False, rich_help_panel=panel, **parse)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _shown(default: Any) -> str:
    if default in (None, "", ()):
        return ""  # the help text describes such a default
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" [default: {','.join(map(str, default)) if isinstance(default, tuple) else default}]"


def with_old_spelling(arguments: Sequence[str], switches: frozenset[str]) -> list[str]:
    """Convert the originals' spelling: --learn_sigma True becomes --learn-sigma, False --no-learn-sigma."""
    result: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name.removeprefix("--") in switches:
            if not equals and rest and rest[0].lower() in _TRUE | _FALSE:
                equals, value = "=", rest.pop(0)
            if equals:
                if value.lower() not in _TRUE | _FALSE:
                    raise ValueError(f"{name} must be true or false, not {value!r}")
                name = name if value.lower() in _TRUE else name.replace("--", "--no-", 1)
                equals = value = ""
        result.append(name + equals + value)
    return result


def in_old_spelling(arguments: Sequence[str]) -> bool:
    """Whether a flag is spelled as the originals spell it, with an underscore."""
    names = (word.partition("=")[0] for word in takewhile(lambda word: word != "--", arguments))
    return any(name.startswith("--") and "_" in name for name in names)


SWITCHES = frozenset(
    f.name.replace("_", "-")
    for config in (
        ClassifierConfig,
        ClassifierTrainConfig,
        DataConfig,
        DiffusionConfig,
        ModelConfig,
        RuntimeConfig,
        SampleConfig,
        StartConfig,
        TrainConfig,
    )
    for f in fields(config)
    if f.type is bool
)
"""Every boolean flag."""
