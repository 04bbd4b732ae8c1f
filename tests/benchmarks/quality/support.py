"""A data set of small images in the place of the real ones, whose packages a test does not need."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from fastdiff.benchmarks.quality.measure import Machine
from fastdiff.benchmarks.quality.pictures import Parts, Source, Uint8Array
from fastdiff.config import RuntimeConfig
from fastdiff.evaluation.extractors import Extracted, Extractor
from fastdiff.runtime.device import Runtime
from fastdiff.runtime.display import Lines

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


COLOURED = Source("colours", SIZE, "train", _coloured, judge_updates=30)

TINY = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "", "batch_size": 4}
TINY |= {"diffusion_steps": 30, "noise_schedule": "cosine"}
"""Flags of a model that trains in no time."""

PLAIN = {"device": "cpu", "compile": "off", "precision": "fp32"}


def machine(said: list[str]) -> Machine:
    """Without a compiler; its lines are added to ``said``."""
    runtime = Runtime.resolve(RuntimeConfig.from_flags(PLAIN))
    return Machine(runtime, Lines(said.append), lambda _: lambda *_: None)


class Means(Extractor):
    """In EfficientNet's place: the mean colour."""

    name = sha256 = family = resizing = "means"

    def _extract(self, images: Tensor) -> Extracted:
        return Extracted(images.float().mean((2, 3)))
