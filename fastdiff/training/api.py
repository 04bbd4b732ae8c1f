"""Training from Python: settings in, a checkpoint out."""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdiff.checkpoint import Checkpoint, ClassifierCheckpoint, find_checkpoint, load_checkpoint, load_classifier
from fastdiff.config import (
    UNUSED_BY_CLASSIFIERS,
    ClassifierConfig,
    ClassifierTrainConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    RuntimeConfig,
    StartConfig,
    TrainConfig,
)
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.training.run import run

_Place = str | os.PathLike[str] | None
_Show = Callable[[str], None] | None


def train(data_dir: _Place = None, run_dir: _Place = None, *, show: _Show = print, **settings: Any) -> Checkpoint:
    """Train a model on a folder, zip or npz of images; returns its EMA checkpoint, on the CPU.

    ``settings`` are the flags of ``fastdiff train`` with underscores: the fields of ModelConfig, DiffusionConfig,
    TrainConfig, DataConfig and RuntimeConfig, and preset, resume, init_from, resume_checkpoint, allow_changes,
    batch_size_per_process and timeout. ``show`` receives each line of the log, which is also written to log.txt in
    ``run_dir`` (by default runs/NAME of the data); None shows nothing. Processes that torchrun started, or those of an
    existing process group, share the work, and each returns the checkpoint: ``run_dir`` is on a disk that all of them
    see. PyTorch's global random generators are seeded.

    ValueError, in one line, if a setting is invalid. KeyboardInterrupt after Ctrl-C and SystemExit after another
    signal, both with the last update saved: ``resume=True`` continues the run.
    """
    return load_checkpoint(find_checkpoint(_train(data_dir, run_dir, show, settings, classifier=False)))


def train_classifier(
    data_dir: _Place = None, run_dir: _Place = None, *, show: _Show = print, **settings: Any
) -> ClassifierCheckpoint:
    """Train a classifier of noisy images, as train trains a diffusion model; returns its checkpoint, on the CPU.

    It holds the EMA of the highest rate if there is one (``ema_rate``, by default none), else the last weights.
    ``settings`` are the flags of ``fastdiff train-classifier`` with underscores: the fields of ClassifierConfig and
    ClassifierTrainConfig, and train's other settings. ``run_dir`` is by default runs/NAME-classifier.
    """
    return load_classifier(_train(data_dir, run_dir, show, settings, classifier=True))


def _train(data_dir: _Place, run_dir: _Place, show: _Show, settings: dict[str, Any], classifier: bool) -> Path:
    """Train a diffusion model or a ``classifier``; returns the run folder."""
    kinds: tuple[type[Config], ...] = (StartConfig, DataConfig, DiffusionConfig, RuntimeConfig)
    kinds += (ClassifierTrainConfig, ClassifierConfig) if classifier else (TrainConfig, ModelConfig)
    known = {f.name: f for kind in kinds for f in fields(kind)}  # type: ignore[arg-type]  # each is a dataclass
    for name in {"dry_run"} | (UNUSED_BY_CLASSIFIERS if classifier else set()):  # a dry run leaves no checkpoint
        del known[name]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"{'train_classifier' if classifier else 'train'} has no setting {', '.join(unknown)}")
    given = {"data_dir": data_dir, "run_dir": run_dir}
    flags = settings | {name: place for name, place in given.items() if place is not None}
    for name, value in flags.items():
        if known[name].metadata["path"]:
            flags[name] = os.path.expanduser(os.fspath(value))
    start = StartConfig.from_flags(flags)
    world = World.join(start.timeout)
    try:
        lines = Lines(show if show is not None and world.main else lambda line: None)
        command = f"fastdiff.{'train_classifier' if classifier else 'train'}(...)"
        ended = run(flags, start, world, lines, classifier, command)
    except (ValueError, OSError) as error:
        if not isinstance(error, ConnectionError):  # without the others a process group cannot be left in order
            world.leave()
        raise
    world.leave()
    if ended.status == 130:
        raise KeyboardInterrupt
    if ended.status:
        raise SystemExit(ended.status)
    return ended.run_dir
