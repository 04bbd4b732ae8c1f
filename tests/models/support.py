"""What the model tests share: small models whose every weight counts, and how two of them are compared."""

from typing import Any

from torch import Tensor

from fastdiff.config import ModelConfig
from fastdiff.models import UNet, build_model

from ..numerics import relative
from ..support import randomise

Results = tuple[Tensor, dict[str, Tensor]]
"""An output and the parameters' gradients."""


ONE_LEVEL: dict[str, Any] = {"image_size": 4, "channel_mult": (1,), "attention_resolutions": ()}
"""Attention in the middle alone: a compiler takes time by the block."""


def small_config(**changes: Any) -> ModelConfig:
    """Two levels, 8 pixels, attention at the lower level."""
    values: dict[str, Any] = {
        "image_size": 8,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 2,
        "attention_resolutions": (4,),
        "channel_mult": (1, 2),
        **changes,
    }
    return ModelConfig(**values)


def small_model(kernels: str = "auto", memory_format: str = "channels_last", **changes: Any) -> UNet:
    """A model of small_config with random weights everywhere, also in the layers that begin at zero."""
    return randomise(build_model(small_config(**changes), kernels, memory_format), seed=0, std=None)


def assert_near(found: Results, expected: Results, tolerance: float) -> None:
    """Each is near by its norm; of gradients that are zero but for rounding, there is a millionth of the largest."""
    (out, grads), (expected_out, expected_grads) = found, expected
    assert relative(out, expected_out) <= tolerance
    assert grads.keys() == expected_grads.keys()
    largest = max(float(value.norm()) for value in expected_grads.values())
    for name, value in expected_grads.items():
        assert float((grads[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-6 * largest, name
