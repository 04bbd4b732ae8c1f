"""A run folder: its configuration, its log, and the check that it holds only one run."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from fastdiff.checkpoint import (
    holds_checkpoint,
    model_path,
    read_metadata,
    run_and_step,
    saved_steps,
    verify_file,
)
from fastdiff.config import RunConfig
from fastdiff.config.base import differences, in_words
from fastdiff.data.classes import composed
from fastdiff.runtime.files import replacing


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of the run in ``run_dir``; ValueError if config.json is damaged.

    If config.json is missing, the newest checkpoint's configuration is used; ValueError if there is none.
    """
    path = run_dir / "config.json"
    try:
        return _from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if (newest := _config_of_newest(run_dir)) is not None:
            return newest[0]
        raise ValueError(
            f"{path} is missing: restore it, or start from the weights in another --run-dir (--init-from)"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        remedy = "restore it, or start again in another --run-dir"
        if (newest := _config_of_newest(run_dir)) is not None:
            remedy = f"move it away, and --resume uses the configuration in {newest[1]}"
        raise ValueError(f"{path} is damaged, or from a newer version ({error}): {remedy}") from None


def _config_of_newest(run_dir: Path) -> tuple[RunConfig, str] | None:
    """The configuration in the newest intact checkpoint, and the name of its file."""
    for step in reversed(saved_steps(run_dir)):
        path = model_path(run_dir, step)
        try:
            verify_file(path)
            return _from_dict(read_metadata(path)["run_config"]), path.name
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return None


def edited(config: RunConfig, run_dir: Path) -> str:
    """What config.json, which holds ``config``, says otherwise than the newest checkpoint; empty if nothing."""
    if (newest := _config_of_newest(run_dir)) is None or newest[0].classifies != config.classifies:
        return ""
    parts = ("model", "diffusion", "data", "train", "runtime")
    changes = in_words(d for part in parts for d in differences(getattr(newest[0], part), getattr(config, part)))
    return f"changed in config.json since {newest[1]}: {changes}" if changes else ""


def _from_dict(values: Mapping[str, Any]) -> RunConfig:
    config = RunConfig.from_dict(values)
    return replace(config, class_names=tuple(map(composed, config.class_names)))


def write_config(config: RunConfig, run_dir: Path, environment: Mapping[str, Any] | None = None) -> None:
    """Write config.json, with the ``environment`` of this process if it is given; OSError if that fails."""
    path = run_dir / "config.json"
    values = config.to_dict() | ({"environment": dict(environment)} if environment else {})
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): name another folder with --run-dir") from error


def holds_run(run_dir: Path) -> bool:
    """Whether a run was started in ``run_dir``."""
    return (run_dir / "config.json").exists() or holds_checkpoint(run_dir)


def refuse_other_run(run_dir: Path, remedy: str = "use --resume, or name another folder with --run-dir") -> None:
    """ValueError if ``run_dir`` already holds a run, which ends in the ``remedy``, or is not a folder."""
    for path in (run_dir, *run_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name another folder with --run-dir")
    if (named := run_and_step(run_dir)) is not None and holds_run(named[0]):
        raise ValueError(
            f"run_dir {run_dir} names step {named[1]} of a run, and a run resumes from its newest step: start "
            f"another --run-dir with --resume-checkpoint {run_dir} or --init-from {run_dir}"
        )
    if holds_run(run_dir):
        raise ValueError(f"{run_dir} already holds a run: {remedy}")


class Log:
    """Writes lines to the terminal and, with a timestamp, to log.txt. Thread-safe."""

    def __init__(self, run_dir: Path, show: Callable[[str], None]) -> None:
        self._file = (run_dir / "log.txt").open("a", encoding="utf-8")
        self._show = show
        self._lock = threading.Lock()

    def __call__(self, line: str, *, shown: bool = True) -> None:
        """Add a line; ``shown=False`` keeps it out of the terminal."""
        with self._lock:
            # A full disk must stop the training when a checkpoint does not fit, not here.
            with contextlib.suppress(OSError):
                self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
                self._file.flush()
            if shown:
                self._show(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class Shown:
    """The log of a dry run: lines are shown and kept nowhere."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def __call__(self, line: str, *, shown: bool = True) -> None:
        """Show the line."""
        if shown:
            self._show(line)


class Silence:
    """The log of every process except rank 0."""

    def __call__(self, line: str, *, shown: bool = True) -> None:
        """Discard the line."""
