"""A data set of small images in the place of the real ones, whose packages a test does not need."""

from collections.abc import Iterator

import numpy as np

from fastdiff.benchmarks.quality.pictures import Parts, Source, Uint8Array

SIZE = 8
COUNTS = {"train": 12, "reference": 16, "held_out": 8}
COLOURS = {"blue": (30, 60, 200), "green": (40, 190, 60), "red": (210, 50, 40)}


def _coloured() -> Parts:
    def images(part: str) -> Iterator[tuple[str, Uint8Array]]:
        random = np.random.default_rng(len(part))
        for name, colour in COLOURS.items():
            for number in range(COUNTS[part]):
                noise = random.integers(-20, 21, (SIZE, SIZE, 3))
                yield f"{name}_{number:02d}", (np.array(colour) + noise).astype(np.uint8)

    return {part: images(part) for part in COUNTS}


COLOURED = Source("colours", SIZE, "train", _coloured)
UPDATES = 30
"""Enough for a judge of colours."""
