"""The nearest training images of samples: does a model repeat what it was trained on?"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastdiff.evaluation.image_sets import ImageSet
from fastdiff.evaluation.metrics import Features, nearest_in
from fastdiff.runtime.files import refuse_unwritable, replacing
from fastdiff.runtime.words import printable
from fastdiff.sampling import save_grid

COUNT = 5
"""Neighbours of each sample."""

SHEET = 16
"""Samples on the sheet, those most like a training image."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest training images of N samples.

    ``rows`` (N, COUNT) are their numbers by rising distance, ``distances`` (N, COUNT) in feature space, and ``ratios``
    (N,) the distance to the nearest one over the distance from that one to the nearest other training image.
    """

    rows: NDArray[np.int64]
    distances: NDArray[np.float64]
    ratios: NDArray[np.float64]

    @property
    def authenticity(self) -> float:
        """The share of samples that are farther from their nearest training image than that is from any other.

        Alaa et al. 2022, section 4: a sample that is not authentic is a noisy copy of a training image.
        """
        return float((self.ratios > 1).mean())

    def suspects(self, count: int) -> NDArray[np.int64]:
        """The numbers of the samples that are most like a training image, the most suspicious first."""
        return np.argsort(self.ratios, kind="stable")[:count]


def refuse_outputs(sheet: Path, overwrite: bool) -> Path:
    """The path of the table beside the sheet; ValueError unless both can be written and are new, or ``overwrite``."""
    table = sheet.with_suffix(".csv")
    if sheet.suffix.lower() != ".png":
        raise ValueError(f"out {sheet} must end in .png")
    for path in (sheet, table):
        if path.is_dir():
            raise ValueError(f"out {path} is a folder: name a file")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: name another file with --out, or use --overwrite")
    refuse_unwritable("out", sheet.parent)
    return table


def neighbours_of(samples: Features, training: Features, device: torch.device | str = "cpu") -> Neighbours:
    """The neighbours of the samples (N, D) among at least two training images (M, D), by their features."""
    squares, rows = nearest_in(samples, training, min(COUNT, len(training)), device)
    found, which = rows[:, 0].unique(return_inverse=True)
    # the nearest training image of one of them is that image itself, the second is the nearest other one
    spacing = nearest_in(training[found.cpu().numpy()], training, 2, device)[0][:, 1][which]
    nearest = squares[:, 0]
    # an equal image is a copy, whatever copies there are among the training images
    ratios = torch.where(nearest == 0, 0, (nearest / spacing).sqrt())
    return Neighbours(rows.cpu().numpy(), squares.sqrt().cpu().numpy(), ratios.cpu().numpy())


def save_sheet(path: Path, found: Neighbours, samples: ImageSet, training: ImageSet) -> None:
    """Save the most suspicious samples, each in a row with its nearest training images and their names, as a PNG."""
    images, names = [], []
    for number in found.suspects(SHEET).tolist():
        images += [samples[number], *(training[row] for row in found.rows[number])]
        names += [samples.name(number, "sample"), *(training.name(row, "image") for row in found.rows[number])]
    save_grid(path, np.stack(images), found.rows.shape[1] + 1, names)


def save_table(path: Path, found: Neighbours, samples: ImageSet, training: ImageSet) -> None:
    """Save the neighbours of every sample as CSV, the most suspicious sample first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    count = found.rows.shape[1]
    writer.writerow(
        ["sample", "ratio", *(f"{what}_{i}" for i in range(1, count + 1) for what in ("nearest", "distance"))]
    )
    for number in found.suspects(len(found.ratios)).tolist():
        cells: list[str] = []
        for row, distance in zip(found.rows[number].tolist(), found.distances[number].tolist(), strict=True):
            cells += [training.name(row, "image"), f"{distance:.6g}"]
        writer.writerow([samples.name(number, "sample"), f"{found.ratios[number]:.6g}", *cells])
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")


def lines(found: Neighbours, samples: ImageSet, training: ImageSet, extractor: str) -> Sequence[str]:
    """What was found, as lines for the log; the last one ends in the figure."""
    first = int(found.suspects(1)[0])
    count = len(found.ratios)
    copies = sum(np.array_equal(samples[i], training[row]) for i, row in enumerate(found.rows[:, 0].tolist()))
    nearest = printable(training.name(int(found.rows[first, 0]), "image"))
    median = float(np.median(found.ratios))
    told = [
        f"nearest: {printable(samples.name(first, 'sample'))} to {nearest}, at {found.ratios[first]:.2f} of the "
        f"distance from that image to the nearest other one (median of all samples {median:.2f})"
        if math.isfinite(found.ratios[first])
        else "nearest: every training image has a copy among the others, and no sample is one of them"
    ]
    if copies:
        told.append(f"{copies:,} of {count:,} samples have the pixels of a training image")
    return [*told, f"authenticity (n={count:,}, {extractor}) {found.authenticity:.4f}"]
