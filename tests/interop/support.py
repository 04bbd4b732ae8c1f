"""State dicts of the released models, and models whose every weight has an effect."""

import torch
from torch import Tensor

from fastdiff import ModelConfig, build_model
from fastdiff.models import UNet

from ..parity.support import load_json
from ..support import randomise

GOLDEN = load_json("state_dicts.json")
"""By architecture: flags, parameter count, every key with its shape."""


def meta_state(name: str) -> dict[str, Tensor]:
    """The golden keys and shapes, without memory."""
    return {key: torch.empty(shape, device="meta") for key, shape in GOLDEN[name]["state_dict"].items()}


def random_model(config: ModelConfig, seed: int = 0) -> UNet:
    """A model without a layer that is zero."""
    torch.manual_seed(seed)
    return randomise(build_model(config).eval(), only_zeros=True)
