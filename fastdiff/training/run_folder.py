"""A run's folder: its configuration, its log, and the rule that one folder holds one run."""

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
    replacing,
    run_and_step,
    saved_steps,
    verify_file,
)
from fastdiff.config import RunConfig
from fastdiff.data.classes import composed


def read_config(run_dir: Path) -> RunConfig:
    """The configuration of the run in ``run_dir``; ValueError where config.json is damaged.

    Where it is missing, that of the newest checkpoint.
    """
    path = run_dir / "config.json"
    try:
        return _from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if (newest := _config_of_newest(run_dir)) is not None:
            return newest[0]
        raise ValueError(
            f"{path} is missing: restore it, or begin in another --run-dir with the weights (--init-from)"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        remedy = "restore it, or begin anew in another --run-dir"
        if (newest := _config_of_newest(run_dir)) is not None:
            remedy = f"move it away, and --resume takes what {newest[1]} says"
        raise ValueError(f"{path} is damaged, or a newer version's ({error}): {remedy}") from None


def _config_of_newest(run_dir: Path) -> tuple[RunConfig, str] | None:
    """The configuration in the newest whole checkpoint, and the name of the file that holds it."""
    for step in reversed(saved_steps(run_dir)):
        path = model_path(run_dir, step)
        try:
            verify_file(path)
            return _from_dict(read_metadata(path, kind="model")["run_config"]), path.name
        except (ValueError, KeyError, TypeError, OSError):
            continue
    return None


def _from_dict(values: Mapping[str, Any]) -> RunConfig:
    config = RunConfig.from_dict(values)
    return replace(config, class_names=tuple(map(composed, config.class_names)))


def write_config(config: RunConfig, run_dir: Path) -> None:
    """Write config.json; OSError where that cannot be."""
    path = run_dir / "config.json"
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): name another folder with --run-dir") from error


def holds_run(run_dir: Path) -> bool:
    """Whether a run was begun in ``run_dir``."""
    return (run_dir / "config.json").exists() or holds_checkpoint(run_dir)


def refuse_other_run(run_dir: Path) -> None:
    """ValueError where ``run_dir`` holds a run, or is no folder."""
    for path in (run_dir, *run_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name another folder with --run-dir")
    if (named := run_and_step(run_dir)) is not None and holds_run(named[0]):
        raise ValueError(
            f"run_dir {run_dir} is the name of step {named[1]} of a run, which goes on from its newest step: begin "
            f"another --run-dir with --resume-checkpoint {run_dir} or --init-from {run_dir}"
        )
    if holds_run(run_dir):
        raise ValueError(f"{run_dir} already holds a run: go on with --resume, or name another folder with --run-dir")


class Log:
    """Lines on the terminal and, with the time, in log.txt. Any thread may add one."""

    def __init__(self, run_dir: Path, show: Callable[[str], None]) -> None:
        self._file = (run_dir / "log.txt").open("a", encoding="utf-8")
        self._show = show
        self._lock = threading.Lock()

    def __call__(self, line: str, *, shown: bool = True) -> None:
        """Add a line; ``shown=False`` leaves it to others to show it."""
        with self._lock:
            # A disk that is full stops the training when a checkpoint does not fit, not here.
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


class Silence:
    """The log of a process that is not the first."""

    def __call__(self, line: str, *, shown: bool = True) -> None:
        """Nothing."""
