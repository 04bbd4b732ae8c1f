"""``--config FILE``: flags from a file, as if they stood on the command line before the given ones."""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.cli.scripts import script_of

_OF_THE_DATA = {"class_names", "class_counts", "data_fingerprint", "reading"}
"""Entries of a run's config.json that describe its data and how it is read, and are no flags, nor is "environment"."""


def with_config_file(words: Sequence[str]) -> list[str]:
    """The words of a command line with ``--config FILE`` replaced by the file's flags, after the command's name.

    ValueError, which names the file, if it cannot be read or holds anything but flags.
    """
    rest = list(words)
    for i, word in enumerate(rest):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if name == "--config":
            if not equals and i + 1 == len(rest):
                raise ValueError("--config needs a value: name a .toml, .yaml or .json file")
            path = Path(value if equals else rest[i + 1]).expanduser()
            del rest[i : i + (1 if equals else 2)]
            if any(word.partition("=")[0] == "--config" for word in rest):
                raise ValueError("--config is given twice: name one file")
            commands = next((n for n, other in enumerate(rest) if other.startswith("-")), len(rest))
            return [*rest[:commands], *_words(path, rest), *rest[commands:]]
    return rest


def _words(path: Path, line: Sequence[str]) -> Iterator[str]:
    """The flags in the file, for this command line."""
    seen: dict[str, Any] = {}
    document = _read(path)
    of_a_run = "class_names" in document
    if of_a_run:
        _refuse_other_command(path, document, line)
        document.pop("environment", None)
    for name, value in _flat(document, path):
        flag = f"--{name.replace('_', '-')}"
        if seen.setdefault(flag, value) != value:  # a run's config.json has learn_sigma twice, with the same value
            raise ValueError(f"{path} sets {flag} twice: keep one of them")
        from_data = name in _OF_THE_DATA or (name == "num_classes" and value == len(document.get("class_names", ())))
        if flag == "--config":
            raise ValueError(f"{path} names another file of flags: leave config out")
        if of_a_run and (from_data or value is None or value == ""):
            continue
        if value is None or value == "":
            raise ValueError(f"{path}: {name} has no value: give one, or leave it out")
        if value is True:
            yield flag
        elif value is False:
            yield flag.replace("--", "--no-", 1)
        elif isinstance(value, list):
            yield f"{flag}={','.join(map(str, value))}"
        else:
            yield f"{flag}={value}"


_TRAINS = {"train": "a diffusion model", "train-classifier": "a classifier"}


def _refuse_other_command(path: Path, document: Mapping[str, Any], line: Sequence[str]) -> None:
    """ValueError, which names the command, if a run's file is given to the training of another kind of model."""
    script = script_of(line)
    command = " ".join(line[:1] if script is None else script.command)
    model = document.get("model")
    own = "train-classifier" if isinstance(model, dict) and "classifier_width" in model else "train"
    if command in _TRAINS and command != own:
        raise ValueError(
            f"config {path} is of a run that trained {_TRAINS[own]}: give it to fastdiff {own}, or name another file"
        )


def _flat(table: Mapping[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """The entries of a table and of the tables in it."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, path)
        elif value is None or isinstance(value, (bool, int, float, str, list)):
            yield str(name), value
        else:
            raise ValueError(f"{path}: {name} must be text, a number, true, false or a list, not {value!r}")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"config {path} cannot be read ({error.strerror}): name a .toml, .yaml or .json file"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"config {path} is not a text file: name a .toml, .yaml or .json file") from None
    parse = _parser(path)
    try:
        document = parse(text)
    except (ValueError, RecursionError) as error:  # a TOML or JSON error is a ValueError, and so is ours of YAML
        raise ValueError(f"config {path} is damaged: {str(error) or 'too deep'}") from None
    if not isinstance(document, dict):
        raise ValueError(f"config {path} must map flags to values, such as image_size = 64")
    return document


def _parser(path: Path) -> Callable[[str], Any]:
    """The function that parses a file of this name; its errors are ValueErrors."""
    match path.suffix.lower():
        case ".toml":
            return tomllib.loads
        case ".json":
            return json.loads
        case ".yaml" | ".yml":
            return _yaml_parser(path)
    raise ValueError(f"config {path}: its name must end in .toml, .yaml or .json")


def _yaml_parser(path: Path) -> Callable[[str], Any]:
    try:
        import yaml
    except ImportError:
        raise ValueError(f"config {path}: YAML needs pyyaml: pip install pyyaml (extra 'yaml'), or use TOML") from None

    def parse(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(" ".join(str(error).split())) from None

    return parse
