"""The suite features: images per second of the default extractor, beside its network as a plain module."""

import torch
from torch import Tensor

from fastdiff.benchmarks.harness import interleaved
from fastdiff.benchmarks.rows import Row
from fastdiff.evaluation import efficientnet
from fastdiff.evaluation.extractor_files import with_weights
from fastdiff.evaluation.extractors import open_extractor, weights_of_package
from fastdiff.evaluation.features import BATCH
from fastdiff.evaluation.resizing import resized_like_pillow
from fastdiff.interop.openai import load_state_dict

SIZE = 64
"""Pixels of the images, which are resized for the network."""

TOLERANCE = 1e-3
"""Largest difference of the features, in units of the largest one: folded batch norms round differently."""


def measure_features(device: torch.device, rounds: int) -> list[Row]:
    """Rows of a batch of images through the plain module and through the extractor, from pixels to features."""
    workload = f"{BATCH} images of {SIZE} pixels"
    try:
        path = weights_of_package()
    except ValueError as error:
        return [Row("features", workload, "extractor", None, remark=str(error))]
    extractor = open_extractor(path, device)
    plain = with_weights(efficientnet.EfficientNetLite0, load_state_dict(path), path).eval().to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8).to(device)

    @torch.inference_mode()
    def in_plain() -> Tensor:
        levels = resized_like_pillow(images, efficientnet.SIZE)
        return plain((levels - efficientnet.MEAN) / efficientnet.DEVIATION)[0]

    def in_ours() -> Tensor:
        return extractor(images).features

    expected, found = in_plain(), in_ours()
    difference = float((found - expected).abs().max() / expected.abs().max())
    names = {"plain module": in_plain, "extractor": in_ours}
    if not difference < TOLERANCE:
        remark = f"wrong: the features differ by {difference:.2g}"
        return [Row("features", workload, name, None, remark=remark, failed=True) for name in names]
    timings = interleaved(names, rounds, 1, device)
    return [Row("features", workload, timing.name, timing, images=BATCH) for timing in timings]
