"""Sample metrics in one call."""

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff.config import MetricsConfig, RuntimeConfig, SampleConfig
from fastdiff.evaluation.image_sets import ImageSet, ReferenceStatistics
from fastdiff.evaluation.session import Session
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines
from fastdiff.runtime.distributed import World

Source = str | os.PathLike[str] | NDArray[np.uint8]


def sample_metrics(samples: Source, reference: Source, **settings: Any) -> dict[str, float]:
    """Compare samples with a reference, as ``fastdiff evaluate fid`` does: the figures by key.

    Each is uint8 images (N, H, W, 3), or the path of an npz, a folder or a zip; the reference may be an npz of
    statistics. The keys are fd (Fréchet distance) and, of a reference with images, kd (kernel distance), kd_deviation,
    precision, recall, density and coverage; some extractors give sfid, inception_score and its deviation, too. Quote a
    figure with its extractor and the number of samples. ``settings`` are extractor, extractor_size, trust, image_size,
    cache_dir, seed and device: see MetricsConfig.

    ValueError, with a message of one line, if an argument is invalid.
    """
    known = {f.name for f in fields(MetricsConfig)} - {f.name for f in fields(SampleConfig)} | {"seed"}
    if unknown := sorted(set(settings) - known - {"device"}):
        raise ValueError(f"sample_metrics has no setting {', '.join(unknown)}")
    config = MetricsConfig(**{name: value for name, value in settings.items() if name in known})
    runtime = Runtime.resolve(RuntimeConfig(device=settings.get("device", "auto")))

    def nothing(*_: Any) -> None:
        pass

    def doubt(line: str) -> None:
        if line.startswith("warning: "):
            warnings.warn(line.removeprefix("warning: "), stacklevel=2)

    session = Session(config, runtime, World(), Lines(doubt), lambda _: nothing)
    ours, theirs = _opened(session, samples, reference)
    with session.comparison(None) as comparison:
        figures = comparison.figures(ours, comparison.reference(theirs))
    found = {str(figure.key): figure.value for figure in figures}
    return found | {f"{f.key}_deviation": f.deviation for f in figures if f.deviation is not None}


def _opened(session: Session, samples: Source, reference: Source) -> tuple[ImageSet, ImageSet | ReferenceStatistics]:
    if isinstance(samples, np.ndarray):
        ours = _of_array(samples, "samples")
        if isinstance(reference, np.ndarray):
            return ours, _of_array(reference, "reference", ours.size)
        return ours, session.reference(Path(reference), ours.size)
    if isinstance(reference, np.ndarray):
        theirs = _of_array(reference, "reference")
        return session.images(Path(samples), theirs.size), theirs
    return session.both(Path(samples), Path(reference))


def _of_array(images: NDArray[np.uint8], name: str, size: int | None = None) -> ImageSet:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"{name} must be square images, uint8 (N, H, H, 3), not {images.dtype} {images.shape}")
    if len(images) < 2:
        raise ValueError(f"{name}: a comparison needs two images or more, not {len(images)}")
    if size not in (None, images.shape[1]):
        raise ValueError(f"{name} has images of {images.shape[1]} pixels, not {size}: compare images of one size")
    return ImageSet(images, about={"data": name, "count": len(images), "size": images.shape[1]})
