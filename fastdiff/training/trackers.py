"""Experiment trackers, which receive the log besides the run folder's files: TensorBoard, Weights & Biases, trackio."""

import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from fastdiff.config import Tracker, TrainConfig
from fastdiff.runtime.files import replacing

PROJECT = "fastdiff"
"""The project name of every run in Weights & Biases and trackio."""


class Sink(ABC):
    """Receives the rows of the log and, if it can show them, images. Steps come in order."""

    @abstractmethod
    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; ``row["step"]`` is its step."""

    def image(self, name: str, path: Path, step: int) -> None:  # noqa: B027  # optional
        """Show the image file ``path`` under ``name``, which is the same at every step."""

    def close(self) -> None:  # noqa: B027  # optional
        """Flush and close; nothing is written afterwards."""


def open_sinks(config: TrainConfig, run_dir: Path, about: Mapping[str, Any], log: Callable[[str], None]) -> list[Sink]:
    """Open the sinks that ``config`` enables; ``about`` is the run's configuration as JSON-compatible values.

    ValueError if a package is missing. If a sink fails, at its start or later, ``log`` receives one warning and the run
    continues without that sink.
    """
    starts: dict[str, Callable[[], Sink]] = {}
    if config.tensorboard:
        starts["tensorboard"] = partial(_TensorBoard, _package("torch.utils.tensorboard", "tensorboard"), run_dir)
    if config.tracker is not Tracker.NONE:
        starts[config.tracker] = partial(_Service, _package(config.tracker, config.tracker), run_dir, about)
    return [_Careful(name, start, log) for name, start in starts.items()]


def refuse_missing(config: TrainConfig) -> None:
    """ValueError if the package of a sink that ``config`` enables is missing; nothing is imported."""
    wanted = ["tensorboard"] * config.tensorboard + [str(config.tracker)] * (config.tracker is not Tracker.NONE)
    for name in wanted:
        found = sys.modules[name] if name in sys.modules else find_spec(name)
        if found is None:
            raise _missing(name)


def _missing(name: str) -> ValueError:
    return ValueError(f"{name} is not installed: pip install {name}")


def _package(module: str, name: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        raise _missing(name) from None


class _TensorBoard(Sink):
    """Event files in the run folder's ``tensorboard/``."""

    def __init__(self, package: ModuleType, run_dir: Path) -> None:
        self._open = partial(package.SummaryWriter, run_dir / "tensorboard")
        self._writer: Any = None

    def write(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._at(step).add_scalar(name, value, step)

    def image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self._at(step).add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        # After a crash the steps past the checkpoint are logged a second time: TensorBoard purges the first ones.
        self._writer = self._writer or self._open(purge_step=step)
        return self._writer


class _Service(Sink):
    """A run of Weights & Biases or trackio, whose calls are the same."""

    def __init__(self, package: ModuleType, run_dir: Path, about: Mapping[str, Any]) -> None:
        # Weights & Biases identifies a run by an id, which the run folder stores; trackio identifies it by its name.
        kept = run_dir / "tracker_id"
        resumed = kept.exists()
        if not resumed:
            with replacing(kept) as temporary:
                temporary.write_text(uuid.uuid4().hex)
        known: dict[str, Any] = {"resume": "allow" if resumed else "never"}
        if package.__name__ == Tracker.WANDB:
            known |= {"id": kept.read_text().strip(), "dir": str(run_dir.resolve())}
        self._image = package.Image
        self._run = package.init(project=PROJECT, name=run_dir.resolve().name, config=dict(about), **known)

    def write(self, row: Mapping[str, float]) -> None:
        # After a crash the steps past the checkpoint are logged a second time, with the same values: Weights & Biases
        # drops them, trackio shows them twice.
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Careful(Sink):
    """A sink that never raises: the first error is logged as a warning and disables it."""

    def __init__(self, name: str, start: Callable[[], Sink], log: Callable[[str], None]) -> None:
        self._name, self._log = name, log
        self._sink: Sink | None = None
        with self._warned():
            self._sink = start()

    def write(self, row: Mapping[str, float]) -> None:
        self._try(lambda sink: sink.write(row))

    def image(self, name: str, path: Path, step: int) -> None:
        self._try(lambda sink: sink.image(name, path, step))

    def close(self) -> None:
        self._try(lambda sink: sink.close())

    def _try(self, call: Callable[[Sink], None]) -> None:
        if self._sink is not None:
            with self._warned():
                call(self._sink)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker must never end a run
            self._sink = None
            said = " ".join(str(error).split()) or type(error).__name__
            self._log(f"warning: {self._name} failed and is off for the rest of this run: {said}")
