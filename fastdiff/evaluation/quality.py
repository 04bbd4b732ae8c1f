"""How good samples are: the metrics of two sets of images, each figure named by its extractor and number of samples."""

import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.config import Metric
from fastdiff.evaluation.extractors import Extractor
from fastdiff.evaluation.features import BATCH, Extraction, OnProgress, extract
from fastdiff.evaluation.image_sets import ImageSet, ReferenceStatistics
from fastdiff.evaluation.metrics import (
    NEAREST_OF_DENSITY,
    SPLITS,
    Features,
    Neighbourhoods,
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    neighbourhoods,
    statistics_of,
)
from fastdiff.runtime.distributed import World
from fastdiff.runtime.words import duration


@dataclass(frozen=True)
class Figure:
    """A metric's value. ``name`` says the extractor and the number of samples."""

    key: Metric
    name: str
    value: float
    deviation: float | None = None

    def line(self) -> str:
        """A line for the log that ends in the value."""
        deviation = "" if self.deviation is None else f", deviation {self.deviation:.3g}"
        return f"{self.name.removesuffix(')')}{deviation}) {shown(self.key, self.value)}"


def shown(key: Metric, value: float) -> str:
    """A figure as text: a kernel distance may be a few thousandths."""
    return f"{value:.4g}" if key is Metric.KD else f"{value:.4f}"


@dataclass(eq=False)
class Reference:
    """What samples are compared with: the reference's statistics and, if it has images, their features.

    ``size`` is the height of its images, or None if that is unknown; ``radii`` are those of its neighbourhoods once
    they are computed, (R, NEAREST_OF_DENSITY).
    """

    statistics: Statistics
    spatial: Statistics | None
    extraction: Extraction | None
    about: dict[str, Any]
    size: int | None
    radii: Tensor | None = None


class Comparison:
    """Compares sets of samples with one reference by the features of an extractor.

    Every process of ``world`` extracts a share of the images; the first one computes the figures. Features are in files
    of ``folder``, which all processes see and the caller removes. ``progress`` returns, for a job's name, what its
    progress is told; ``log`` receives warnings.
    """

    def __init__(
        self,
        extractor: Extractor,
        device: torch.device,
        folder: Path,
        world: World,
        log: Callable[[str], None],
        progress: Callable[[str], OnProgress],
        seed: int = 0,
    ) -> None:
        self.extractor = extractor
        self._device, self._folder, self._world, self._seed = device, folder, world, seed
        self._log, self._progress, self._warned = log, progress, False

    def reference(self, known: ImageSet | ReferenceStatistics) -> Reference | None:
        """The reference that is known by its images, or by the statistics of its features; None but on rank 0.

        Collective.
        """
        if isinstance(known, ReferenceStatistics):
            extraction = None if known.images is None else self.extract(known.images, "reference", ())
            return Reference(known.features, known.spatial, extraction, known.about, known.size)
        extraction = self.extract(known, "reference", ("spatial",))
        if extraction is None:
            return None
        spatial = None if extraction.spatial is None else statistics_of(extraction.spatial, self._device)
        return Reference(statistics_of(extraction.features, self._device), spatial, extraction, known.about, known.size)

    def figures(self, samples: ImageSet, reference: Reference | None) -> list[Figure]:
        """The figures of the samples on rank 0, none on other processes. Collective."""
        extraction = self.extract(samples, "samples", ("spatial", "probabilities"))

        def computed() -> list[Figure]:
            if extraction is None:
                return []
            assert reference is not None
            return list(self._figures(extraction, reference))

        return self._world.on_all(computed)

    def _figures(self, samples: Extraction, reference: Reference) -> Iterator[Figure]:
        device, features, theirs = self._device, samples.features, reference.extraction
        count, dimensions = features.shape
        known = [len(features)] + [reference.statistics.count] * (reference.statistics.count > 0)
        if min(known) <= dimensions and not self._warned:
            self._warned = True
            self._log(
                f"warning: {min(known):,} images for {dimensions:,} features: the Fréchet distance is biased upwards "
                f"and compares only with equal numbers of images; {self._called('K')} has no such bias"
            )
        named = f"n={count:,}, {self.extractor.name}"
        ours = statistics_of(features, device)
        if not ours.covariance.any():
            self._log(f"warning: {self.extractor.name} gives all samples the same features, which say nothing of them")
        distance = frechet_distance(ours, reference.statistics, device)
        yield self._figure(Metric.FD, f"{self._called('F')} ({named})", distance)
        if theirs is not None:
            kernel = kernel_distance(features, theirs.features, self._seed, device=device)
            subsets = f"{kernel.subsets} subsets of {kernel.size:,}"
            name = f"{self._called('K')} ({named}, {subsets}, seed {self._seed})"
            yield self._figure(Metric.KD, name, kernel.mean, kernel.deviation)
            smaller = min(count, len(theirs.features))
            if smaller > NEAREST_OF_DENSITY:
                found = self._neighbourhoods(features, theirs.features, reference)
                for key in (Metric.PRECISION, Metric.RECALL, Metric.DENSITY, Metric.COVERAGE):
                    yield self._figure(key, f"{key} ({named})", getattr(found, key))
            else:
                needed = f"{NEAREST_OF_DENSITY + 1} images or more"
                self._log(f"precision, recall, density and coverage need {needed} on both sides, not {smaller}")
        if samples.spatial is not None and reference.spatial is not None:
            distance = frechet_distance(statistics_of(samples.spatial, device), reference.spatial, device)
            yield self._figure(Metric.SFID, f"sFID ({named})", distance)
        if samples.probabilities is not None and not self.extractor.family:
            score, deviation = inception_score(samples.probabilities, self._seed)
            splits = f"{min(SPLITS, count)} splits, seed {self._seed}"
            yield self._figure(Metric.SCORE, f"Inception score ({named}, {splits})", score, deviation)

    def _neighbourhoods(self, samples: Features, images: Features, reference: Reference) -> Neighbourhoods:
        """Those of the samples; the reference's radii are computed once."""
        told, began = self._progress("distances"), time.perf_counter()

        def advance(done: int, total: int) -> None:
            left = (time.perf_counter() - began) / done * (total - done)
            told(done, total, f"{duration(left)} left")

        if reference.radii is None:
            reference.radii = nearest_distances(images, NEAREST_OF_DENSITY, self._device)
        return neighbourhoods(samples, images, self._device, advance, reference.radii)

    def _called(self, letter: str) -> str:
        """The name of the Fréchet (F) or kernel (K) distance of this extractor's features."""
        family = self.extractor.family
        return f"{letter}D-{family}" if family else f"{letter}ID"

    @staticmethod
    def _figure(key: Metric, name: str, value: float, deviation: float | None = None) -> Figure:
        if not (math.isfinite(value) and math.isfinite(deviation or 0)):
            raise ValueError(f"{name} is not a finite number: the features are too large, or damaged")
        return Figure(key, name, value, deviation)

    def extract(self, images: ImageSet, what: str, more: Collection[str] = ()) -> Extraction | None:
        """The features of the images and ``more``, in files of the folder ``what``; None but on rank 0. Collective."""
        folder = self._folder / what

        def emptied() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

        self._world.from_main(emptied)
        with self._world.explained(f"batches of {BATCH} images do not fit into the extractor: use --device cpu"):
            return extract(images, self.extractor, folder, self._device, self._world, self._progress(what), more)
