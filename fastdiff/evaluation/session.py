"""What the commands that measure samples share: samples and reference, the network, the machine and the display."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.checkpoint import Checkpoint, holds_checkpoint, run_and_step
from fastdiff.config import READING, Cache, DataConfig, MetricsConfig, SampleConfig
from fastdiff.data import load_shared
from fastdiff.data.loading import is_npz
from fastdiff.evaluation.extractors import Extractor, open_extractor
from fastdiff.evaluation.features import OnProgress
from fastdiff.evaluation.image_sets import (
    ImageSet,
    ReferenceStatistics,
    holds_images,
    holds_statistics,
    of_dataset,
    open_images,
    read_statistics,
)
from fastdiff.evaluation.quality import Comparison
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.sampling import Job, Plan, SampleFiles, settings_of
from fastdiff.training.held_out import is_held_out

FOLDER = "evaluation"
"""The folder of a run that keeps what its evaluations draw and find."""

_DIGITS = 12  # of the SHA-256 of a job's settings, in the name of its samples


@dataclass(frozen=True)
class Drawing:
    """The job that draws a checkpoint's samples into the file ``path``, which its settings name.

    ``origin`` are these settings, as values for JSON. ``there`` says that the file exists already.
    """

    path: Path
    origin: dict[str, Any]
    there: bool
    run: Callable[[], int]
    """Draw what is missing; returns 0, or a signal's exit status."""


def is_checkpoint(place: Path | None) -> bool:
    """Whether a place names a model, not images: a checkpoint's file, a run folder, run@step, or nothing."""
    if place is None or run_and_step(place) is not None:
        return True
    if place.is_dir():
        return (place / "config.json").exists() or holds_checkpoint(place)
    return place.suffix in (".safetensors", ".pt", ".pth")


def folder_for(checkpoint: Path) -> Path:
    """Where the evaluations of a checkpoint's file are kept: in its run folder, or else in the working directory."""
    return checkpoint.parent / FOLDER if holds_checkpoint(checkpoint.parent) else Path(FOLDER)


class Session:
    """Opens what is compared, draws samples and compares features as ``config`` says.

    ``progress`` returns, for a job's name, what its progress is told. Every process of ``world`` creates one and calls
    the same methods.
    """

    def __init__(
        self,
        config: MetricsConfig,
        runtime: Runtime,
        world: World,
        display: Lines,
        progress: Callable[[str], OnProgress],
    ) -> None:
        self.config, self.runtime, self.world, self.display = config, runtime, world, display
        self.progress = progress

    @cached_property
    def extractor(self) -> Extractor:
        """The network whose features are compared, opened when it is first asked for. Collective."""
        config = self.config
        found = self.world.on_all(
            lambda: open_extractor(
                config.extractor, self.runtime.device, trust=config.trust, size=config.extractor_size
            )
        )
        self.display.line(f"extractor: {found.name}; images are resized: {found.resizing}")
        return found

    def images(self, place: Path, size: int | None = None) -> ImageSet:
        """The images of an npz, or of a folder or zip at ``size``: by default config.image_size."""

        def refuse_run() -> None:
            if is_checkpoint(place):
                raise ValueError(f"{place} is a run or checkpoint, not images: name images, or an npz drawn from it")

        self.world.from_main(refuse_run)
        config = DataConfig(cache_dir=self.config.cache_dir)
        return open_images(place, size or self.config.image_size, self.world, self.display, config)

    def reference(self, place: Path, size: int | None = None) -> ImageSet | ReferenceStatistics:
        """The images or statistics at ``place``, of images of ``size``.

        A file of guided-diffusion's evaluator may hold both: its statistics are Inception's and those of more images,
        so they count if that is the extractor.
        """
        world = self.world
        statistics = world.from_main(lambda: place.is_file() and holds_statistics(place))
        both = statistics and world.from_main(lambda: holds_images(place))
        if not statistics or (both and self.extractor.family):
            return self.images(place, size)
        images = self.images(place, size) if both else None
        found = world.on_all(lambda: read_statistics(place, self.extractor, self.runtime.device, size))
        return found if images is None else replace(found, images=images, size=images.size)

    def both(self, samples: Path, reference: Path) -> tuple[ImageSet, ImageSet | ReferenceStatistics]:
        """Samples that exist already and what they are compared with, at one size: that of an npz goes first."""

        def reference_decides() -> bool:
            of_images = reference.suffix.lower() == ".npz" and reference.is_file() and not holds_statistics(reference)
            return of_images and samples.suffix.lower() != ".npz" and self.config.image_size is None

        if self.world.from_main(reference_decides):
            theirs = self.images(reference)
            return self.images(samples, theirs.size), theirs
        ours = self.images(samples)
        return ours, self.reference(reference, ours.size)

    def training_images(self, loaded: Checkpoint, path: Path) -> ImageSet:
        """The images that the checkpoint was trained on, by its own configuration, without those that it held out.

        ValueError if they are gone.
        """
        run, model = loaded.metadata.get("run_config", {}), loaded.model_config

        def found() -> tuple[DataConfig, int, int, float, str]:
            remedy = "name the images to compare with after it"
            try:
                config, reading = DataConfig.from_dict(run["data"]), int(run.get("reading", 1))
                held_out = 0.0 if run["train"].get("val_data_dir") else float(run["train"].get("holdout", 0))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path} does not say which images it was trained on: {remedy}") from None
            if not Path(config.data_dir).exists():
                raise ValueError(f"{config.data_dir}, on which {path} was trained, does not exist: {remedy}")
            config = replace(config, cache=Cache.DISK, cache_dir=self.config.cache_dir or config.cache_dir)
            size = config.decoded_size(model.image_size) if is_npz(Path(config.data_dir)) else model.image_size
            return config, size, min(reading, READING), held_out, str(run.get("data_fingerprint", ""))

        config, size, reading, held_out, fingerprint = self.world.from_main(found)
        world, display = self.world, self.display
        with warnings.catch_warnings(action="ignore"):  # they are about training on these images
            dataset = load_shared(
                config, size, labelled=model.class_cond, world=world, display=display, reading=reading
            )
        if fingerprint not in ("", dataset.fingerprint):
            display.line(f"warning: the images in {config.data_dir} are not those that {path} was trained on")
        images = of_dataset(dataset, config.data_dir, model.image_size)
        if not held_out:
            return images
        trained_on = np.flatnonzero(~is_held_out(dataset.names, held_out))
        return images.only(trained_on, held_out=len(images) - len(trained_on))

    def drawing(self, loaded: Checkpoint, path: Path, out_dir: Path, seed: int | None = None) -> Drawing:
        """The job that draws config.num_samples images of the checkpoint at ``path`` into a file of ``out_dir``.

        ``seed`` is another seed than config.seed: two checkpoints that are compared must not start from the same noise.
        An unfinished job is resumed; a finished one draws nothing. ValueError if the model draws no images by itself.
        """
        world, config = self.world, self.config.within(loaded.diffusion_config.diffusion_steps)
        if small := loaded.model_config.small_size:
            world.refuse(
                f"{path} enlarges images of {small} pixels: draw with fastdiff sample and --base-samples, and name the "
                "npz that it writes"
            )
        drawing = SampleConfig.from_flags(config.to_dict() | ({} if seed is None else {"seed": seed}))

        def planned() -> Plan:
            nothing: dict[str, Any] = {"base_samples": None, "super_res": None, "ends": None, "classes": ()}
            return Plan.of(loaded, drawing, num_samples=None, **nothing)

        plan, numbers = world.on_all(planned), np.arange(config.num_samples)
        settings = world.from_main(lambda: settings_of(plan, numbers, self.runtime, path))
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        files = SampleFiles(out_dir / f"samples_{path.stem}_{digest}.npz", option="")
        there = world.from_main(files.out.exists)

        def run() -> int:
            if there:
                self.display.line(f"samples: {files.out}, drawn before")
                return 0
            world.from_main(files.check)
            job = world.on_all(lambda: Job(plan, numbers, files, settings, self.runtime, world))
            return job.run(self.display.line, self.progress("image steps"))

        return Drawing(files.out, {"count": config.num_samples, **settings}, there, run)

    @contextmanager
    def comparison(self, out_dir: Path | None) -> Iterator[Comparison]:
        """A Comparison whose features are in a folder of ``out_dir``, or of the system, that is removed at the end."""

        def made() -> Path:
            if out_dir is not None:
                out_dir.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(out_dir)
            prefix = f".features.{socket.gethostname()}.{os.getpid()}."
            return Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=out_dir))

        folder, world = self.world.from_main(made), self.world
        line, seed = self.display.line, self.config.seed
        try:
            yield Comparison(self.extractor, self.runtime.device, folder, world, line, self.progress, seed)
        finally:
            if world.main:
                shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(out_dir: Path) -> None:
    """Delete the features that killed processes of this machine left behind."""
    for folder in out_dir.glob(f".features.{socket.gethostname()}.*.tmp"):
        process = folder.name.split(".")[-3]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, OSError):
            continue
