"""Measures what a run draws: the judge's verdict, distances to the real images and the likelihood of held-out ones."""

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.benchmarks.quality.judge import open_judge, share_named
from fastdiff.benchmarks.quality.pictures import Source, read_pictures, write_pictures
from fastdiff.checkpoint import find_checkpoint, load_checkpoint
from fastdiff.config import DataConfig, MetricsConfig, NllConfig, Prediction, QualityConfig
from fastdiff.data import load_shared, read_samples
from fastdiff.evaluation.extractors import Extractor, open_extractor
from fastdiff.evaluation.features import Extraction, OnProgress, extract
from fastdiff.evaluation.image_sets import ImageSet
from fastdiff.evaluation.metrics import frechet_distance, neighbourhoods, statistics_of
from fastdiff.evaluation.nll import Nll, Stopped
from fastdiff.evaluation.session import Session, folder_for, is_checkpoint
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World
from fastdiff.runtime.signals import StopRequest

NLL_IMAGES, NLL_STEPS = 64, 100
"""Held-out images and timesteps of the bound: few, which gives another bound than all, but the same for every run."""


@dataclass(frozen=True)
class Figures:
    """What is measured of a run; NaN is what was left out.

    ``accuracy`` is the share of the samples that the judge assigns to the class that was asked for. ``fd``,
    ``precision`` and ``recall`` compare the judge's features of samples and reference, ``fd_efficientnet`` those of
    EfficientNet. ``bits_per_dim`` is the bound of NLL_IMAGES held-out images in NLL_STEPS timesteps.
    """

    accuracy: float = math.nan
    fd: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    fd_efficientnet: float = math.nan
    bits_per_dim: float = math.nan

    def line(self) -> str:
        """The figures in one line of a log."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if not math.isnan(value))


@dataclass(frozen=True)
class Machine:
    """Where the command runs and what it tells: ``progress`` returns, for a job's name, what its progress is told."""

    runtime: Runtime
    display: Lines
    progress: Callable[[str], OnProgress]


class Bench:
    """Measures runs that were trained on one data set. Its parts and its judge are made first if ``folder`` lacks them.

    ``quick`` leaves out the distance of EfficientNet's features and the likelihood. ``images`` is the number of those
    to train on, and ``measured_with`` names the networks, with a digest of their weights, and the likelihood.
    ValueError if a package is not installed, or the judge is not good enough.
    """

    def __init__(self, source: Source, folder: Path, config: QualityConfig, machine: Machine, quick: bool) -> None:
        self.source, self.folder = source, folder
        drawing = MetricsConfig(num_samples=config.num_samples, sampler=config.sampler, steps=config.steps)
        session = Session(drawing, machine.runtime, World(), machine.display, machine.progress)
        self._session = session
        write_pictures(source, folder)
        self.judge = open_judge(source, folder, machine.runtime.device, machine.display.line)
        session.display.line(f"judge of {source.name}: names {self.judge.accuracy:.1%} of held-out real images rightly")
        self._likelihood = not quick
        self._extractors: dict[str, Extractor] = {"judge": self.judge}
        if not quick:
            try:
                self._extractors["efficientnet"] = open_extractor(device=session.runtime.device)
            except ValueError as error:
                session.display.line(f"FD-EfficientNet is left out: {error}")
        self._reference: Mapping[str, Extraction] = {}
        self.images = len(list((folder / "train").glob("*.png")))
        bound = () if quick else (f"bits/dim-{NLL_IMAGES}x{NLL_STEPS}",)
        named = (f"{name}-{extractor.sha256[:12]}" for name, extractor in self._extractors.items())
        self.measured_with = (*named, *bound)

    def measure(self, place: Path) -> Figures:
        """The figures of a checkpoint, of the newest of a run, or of an npz of samples.

        A model's samples are kept in the run's folder, and are not drawn again. Samples of an npz have no likelihood.
        SystemExit if a signal ended the drawing. ValueError if the images have another size or other classes than those
        of the set.
        """
        bits_per_dim = math.nan
        if is_checkpoint(place):
            path = find_checkpoint(place)
            loaded = load_checkpoint(path, **self._where())
            model = loaded.model_config
            self._refuse_others(path, model.image_size, loaded.class_names if model.class_cond else None)
            drawing = self._session.drawing(loaded, path, folder_for(path))
            if status := drawing.run():
                raise SystemExit(status)
            samples = read_samples(drawing.path)
            bits_per_dim = self._bits_per_dim(path) if self._likelihood else math.nan
        else:
            samples = read_samples(place)
            self._refuse_others(place, samples.images.shape[1], samples.class_names)
        names = samples.class_names
        asked = None if samples.labels is None or names is None else self._judged(samples.labels, names)
        return self.figures(samples.images, asked, bits_per_dim)

    def _refuse_others(self, path: Path, size: int, class_names: Sequence[str] | None) -> None:
        """ValueError if the images of ``path`` are not like those of the set."""
        if size != self.source.size:
            raise ValueError(
                f"{path} has images of {size} pixels, and {self.source.name} have {self.source.size}: "
                "choose another --set"
            )
        if class_names is not None and set(class_names) != set(self.judge.class_names):
            raise ValueError(f"{path} has other classes than {self.source.name}: train on {self.folder / 'train'}")

    def figures(
        self, images: NDArray[np.uint8], asked: NDArray[np.int64] | None, bits_per_dim: float = math.nan
    ) -> Figures:
        """The figures of images (N, H, W, 3), of which the judge's classes ``asked`` (N,) were asked for, if any."""
        found = self._features(images)
        self._reference = self._reference or self._features(read_pictures(self.folder / "reference").images)
        distances = {
            name: frechet_distance(statistics_of(of.features), statistics_of(self._reference[name].features))
            for name, of in found.items()
        }
        judged = found["judge"]
        assert judged.probabilities is not None
        near = neighbourhoods(judged.features, self._reference["judge"].features)
        return Figures(
            math.nan if asked is None else share_named(judged.probabilities.argmax(1), asked),
            distances["judge"],
            near.precision,
            near.recall,
            distances.get("efficientnet", math.nan),
            bits_per_dim,
        )

    def _judged(self, labels: NDArray[np.int64], class_names: tuple[str, ...]) -> NDArray[np.int64]:
        """The labels in the judge's numbering."""
        return np.array([self.judge.class_names.index(name) for name in class_names])[labels]

    def _features(self, images: NDArray[np.uint8]) -> dict[str, Extraction]:
        """What each extractor finds in the images (N, H, W, 3)."""
        found, session = {}, self._session
        for name, extractor in self._extractors.items():
            with tempfile.TemporaryDirectory() as folder:
                progress = session.progress(f"features of {extractor.name}")
                mapped = extract(
                    ImageSet(images), extractor, Path(folder), session.runtime.device, session.world, progress
                )
                assert mapped is not None
                probabilities = mapped.probabilities
                found[name] = Extraction(
                    np.array(mapped.features), None, None if probabilities is None else np.array(probabilities)
                )
        return found

    def _bits_per_dim(self, path: Path) -> float:
        """The bound of held-out images, or NaN and a line for a flow, which has none; SystemExit after a signal."""
        session, loaded = self._session, load_checkpoint(path, **self._where())
        if loaded.diffusion_config.prediction is Prediction.FLOW:
            session.display.line("bits/dim is left out: a flow has no variational bound")
            return math.nan
        steps = min(NLL_STEPS, loaded.diffusion_config.diffusion_steps)
        config = NllConfig(data_dir=str(self.folder / "held_out"), steps=steps)
        with warnings.catch_warnings(action="ignore"):  # they are about training on these images
            dataset = load_shared(
                DataConfig(data_dir=config.data_dir),
                self.source.size,
                labelled=loaded.model_config.class_cond,
                world=session.world,
                display=session.display,
            )
        spread = np.linspace(0, len(dataset.images) - 1, min(NLL_IMAGES, len(dataset.images))).round().astype(int)
        names = tuple(dataset.names[row] for row in spread)
        labels = None if dataset.labels is None else dataset.labels[spread]
        dataset = replace(dataset, images=dataset.images[spread], labels=labels, names=names)
        evaluation = Nll(loaded, dataset, config, session.runtime, session.world)
        with StopRequest("stopping after this step") as stop:
            try:
                return evaluation.run(stop, session.progress("likelihood")).figures()["bits_per_dim"]
            except Stopped as stopped:
                raise SystemExit(128 + stopped.signal) from None

    def _where(self) -> dict[str, Any]:
        runtime = self._session.runtime
        return {"device": runtime.device, "kernels": runtime.kernels, "memory_format": runtime.memory_format}
